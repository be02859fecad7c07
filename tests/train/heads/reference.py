"""The toy kinds' rollouts in float64 NumPy, index by index, and what they lose.

Dimensions: B rows, T positions, K steps, H hidden size, D draft vocabulary; J key/value heads, d head_dim.
"""

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


class Layers:
    """The transformer layers of a head with these parameters."""

    def __init__(self, head, p):
        self.head, self.p = head, p

    def _turned(self, x, position):
        d = self.head.head_dim
        x = x.reshape(-1, d)
        angle = position * self.head.theta ** -(np.arange(0, d, 2) / d)
        a, b = np.split(x, 2, 1)
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1
        )

    def keys(self, number, x, position, normed=True):
        """(key, value) [J, d] of a state."""
        w = {name: self.p[f"layers.{number}.{name}"] for name in ("in", "k", "v")}
        x = rms(x, w["in"], self.head.rms_eps) if normed else x
        return self._turned(w["k"] @ x, position), (w["v"] @ x).reshape(-1, self.head.head_dim)

    def block(self, number, x, position, seen):
        """The state behind a layer that sees these (key, value)."""
        c, w = self.head, {name: self.p[f"layers.{number}.{name}"] for name in ("in", "q", "o", "post")}
        q = self._turned(w["q"] @ rms(x, w["in"], c.rms_eps), position)
        keys, values = (
            np.repeat(np.stack(part), c.heads // c.kv_heads, 1) for part in zip(*seen, strict=True)
        )
        scores = np.einsum("nd,snd->ns", q, keys) / c.head_dim**0.5
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        x = x + w["o"] @ np.einsum("ns,snd->nd", p, values).reshape(-1)
        inner = rms(x, w["post"], c.rms_eps)
        gate, up, down = (self.p[f"layers.{number}.{name}"] for name in ("gate", "up", "down"))
        gated = gate @ inner
        return x + down @ (gated / (1 + np.exp(-gated)) * (up @ inner))


def mtp(head, p, embedded, aux, last, steps):
    """[T, K, H] of a document, NaN where the text ends."""
    layers, T = Layers(head, p), len(embedded)

    def joined(token, state):
        both = rms(embedded[token], p["enorm"], head.rms_eps), rms(state, p["hnorm"], head.rms_eps)
        return p["join"] @ np.concatenate(both[::-1] if head.hidden_first else both)

    first = [layers.keys(0, joined(i + 1, last[i]), i) for i in range(T - 1)]
    found = np.full((T, steps, head.hidden_size), np.nan)
    for i in range(T - 1):
        state, own = last[i], []
        for k in range(min(steps, T - 1 - i)):
            x = joined(i + 1 + k, state)
            own += [layers.keys(0, x, i + k)] if k else []
            state = layers.block(0, x, i + k, first[: i + 1] + own)
            found[i, k] = rms(state, p["norm"], head.rms_eps)
    return found


def peagle(head, p, embedded, aux, last, steps, mask):
    layers, T, count = Layers(head, p), len(embedded), head.stack

    def joined(token, state):
        both = rms(token, p["enorm"], head.rms_eps), rms(state, p["hnorm"], head.rms_eps)
        return p["join"] @ np.concatenate(both)

    x = np.array([joined(embedded[i + 1], p["fc"] @ aux[i].reshape(-1)) for i in range(T - 1)])
    states = np.full((T, steps, head.hidden_size), np.nan)
    states[: T - 1, 0], states[:, 1:] = x, joined(mask, p["shared"])
    for number in range(count):
        first = [layers.keys(number, states[i, 0], i) for i in range(T - 1)]
        new = states.copy()
        for i in range(T - 1):
            own = [layers.keys(number, states[i, k], i + k) for k in range(1, steps)]
            for k in range(steps):
                new[i, k] = layers.block(number, states[i, k], i + k, first[: i + 1] + own[:k])
        states = new
    return rms(states, p["norm"], head.rms_eps)


def dflash(head, p, embedded, aux, last, steps, mask):
    layers, T, S = Layers(head, p), len(embedded), head.masks + 1
    given = [rms(p["fc"] @ aux[i].reshape(-1), p["hnorm"], head.rms_eps) for i in range(T)]
    found = np.full((T, steps, head.hidden_size), np.nan)
    for i in range(T - 1):
        x = [embedded[i + 1], *[mask] * head.masks]
        for number in range(head.depth):
            seen = [layers.keys(number, given[j], j, normed=False) for j in range(i + 1)]
            seen += [layers.keys(number, x[s], i + 1 + s) for s in range(S)]
            x = [layers.block(number, x[s], i + 1 + s, seen) for s in range(S)]
        found[i] = rms(np.stack(x[1 : steps + 1]), p["norm"], head.rms_eps)
    return found


def losses(rollout, head, p, rows, taught_KBT, counts_K, decay, target, draft_ids, masks):
    """(the loss, those of steps [K]) of targets `taught` at each step, divided by `counts`. `target`:
    (embedding, lm_head); `rows`: arrays of a store; `masks`: more that a rollout takes."""
    embed, lm_head = target
    steps, by_step = len(taught_KBT), np.zeros(len(taught_KBT))
    for b, segments in enumerate(rows["segment_ids"]):
        for number in set(segments[segments > 0]):
            (at,) = np.nonzero(segments == number)
            document = embed[rows["tokens"][b, at]], rows["aux_hidden"][b, at], rows["last_hidden"][b, at]
            states = rollout(head, p, *document, steps, *masks)
            for k in range(steps):
                for i, j in zip(at, at[1 + k :], strict=False):
                    if not taught_KBT[k, b, j] or rows["argmax"][b, j] not in draft_ids:
                        continue
                    logits = p["lm_head"] @ states[i - at[0], k]
                    teacher = lm_head[draft_ids] @ rows["last_hidden"][b, j]
                    teacher = np.exp(teacher - teacher.max())
                    log_q = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                    by_step[k] -= (teacher / teacher.sum() * log_q).sum() / counts_K[k]
    return (by_step * decay ** np.arange(steps)).sum(), by_step
