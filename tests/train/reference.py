"""The training-time test (TTT), its losses and metrics, in float64 NumPy loops over rows, positions, steps.

It shares no code with the trainer except the RoPE frequencies; it is slow, and meant to be read. Sources:
EAGLE-3 (arXiv 2503.01840), SafeAILab/EAGLE `eagle/traineagle3/cnets.py`, and SpecForge for `compat`. The
model of speculators 0.9 (`models/eagle3/core.py`, with torch's own attention) gave the same logits within
2e-6 at three steps: of the plain head, of EAGLE3.1, with norm_before_residual, of three layers with them all.

Dimensions: K steps, B rows, T positions, A aux states, H hidden size, V target vocabulary, N draft
vocabulary, Q query heads, G key/value heads, D head_dim, S visible keys.

Segment 0 is padding. Position i of step k sees the token x[i+1+k], learns from the target's logits at i+1+k,
and thereby predicts x[i+2+k].
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.rope import inverse_frequencies
from train.heads.eagle3.head import Eagle3

Params = dict[str, np.ndarray]


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def same_document(segments_T, i: int, j: int) -> bool:
    """Whether position j exists and belongs to the document of position i."""
    return j < len(segments_T) and segments_T[i] != 0 and segments_T[j] == segments_T[i]


def _rotate(x_D, angle, magnitude):
    """Half rotation, as HF does it: dimension d turns with d + D // 2."""
    cos, sin = magnitude * np.cos(angle), magnitude * np.sin(angle)
    first, second = np.split(x_D, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attend(q_QD, keys: list, values: list):
    """Softmax attention of a query [Q, D] over lists of visible keys and values, each [G, D]."""
    Q, D = q_QD.shape
    k_SGD, v_SGD = np.stack(keys), np.stack(values)
    group = Q // k_SGD.shape[1]
    out = []
    for head in range(Q):
        k_SD, v_SD = k_SGD[:, head // group], v_SGD[:, head // group]
        out.append(softmax(k_SD @ q_QD[head] / np.sqrt(D)) @ v_SD)
    return np.concatenate(out)


def _projections(p: Params, c: Eagle3, layer: str, embedded_H, state_H, position: int):
    """Query, key (both turned by `position`) and value of one position in one layer."""
    if layer == "midlayer":
        x = np.concatenate(
            [
                rms_norm(embedded_H, p["midlayer.input_layernorm.weight"], c.rms_eps),
                rms_norm(state_H, p["midlayer.hidden_norm.weight"], c.rms_eps),
            ]
        )
    else:
        x = rms_norm(state_H, p[f"{layer}.input_layernorm.weight"], c.rms_eps)
    q, k, v = ((p[f"{layer}.self_attn.{n}_proj.weight"] @ x).reshape(-1, c.head_dim) for n in "qkv")
    frequencies, magnitude = inverse_frequencies(c.head_dim, c.rope_theta, c.rope)
    angle = position * frequencies.astype(np.float64)
    return _rotate(q, angle, magnitude), _rotate(k, angle, magnitude), v


def _mlp(p: Params, c: Eagle3, layer: str, state_H):
    y = rms_norm(state_H, p[f"{layer}.post_attention_layernorm.weight"], c.rms_eps)
    gate = p[f"{layer}.mlp.gate_proj.weight"] @ y
    up = p[f"{layer}.mlp.up_proj.weight"] @ y
    return p[f"{layer}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def _fused(p: Params, c: Eagle3, aux_AH):
    if c.fc_norm:
        aux_AH = [rms_norm(aux, p[f"fc_norm.{a}.weight"], c.rms_eps) for a, aux in enumerate(aux_AH)]
    return p["fc.weight"] @ np.concatenate(list(aux_AH))


def _rollout_row(p, c, embed_VH, tokens_T, segments_T, positions_T, aux_TAH, steps):
    T = len(tokens_T)
    state = [_fused(p, c, aux) for aux in aux_TAH]
    names = ["midlayer", *(f"layers.{number}" for number in range(1, c.layers))]
    keys: dict = {name: [] for name in names}  # [layer][step][position]
    values: dict = {name: [] for name in names}
    logits_KTN = np.zeros((steps, T, c.draft_vocab_size))
    for k in range(steps):
        for name in names:
            queries = []
            keys[name].append([])
            values[name].append([])
            for i in range(T):
                token = tokens_T[i + 1 + k] if same_document(segments_T, i, i + 1 + k) else 0
                q, key, value = _projections(p, c, name, embed_VH[token], state[i], int(positions_T[i]) + k)
                queries.append(q)
                keys[name][k].append(key)
                values[name][k].append(value)
            for i in range(T):
                if segments_T[i] == 0:
                    continue  # a padding position has no document to attend to, and its logits stay 0
                # Step 0's keys up to i of this document, then this index's own keys of steps 1..k.
                past = [j for j in range(i + 1) if segments_T[j] == segments_T[i]]
                seen_keys = [keys[name][0][j] for j in past] + [keys[name][s][i] for s in range(1, k + 1)]
                seen_values = [values[name][0][j] for j in past]
                seen_values += [values[name][s][i] for s in range(1, k + 1)]
                attended = _attend(queries[i], seen_keys, seen_values)
                if name == "midlayer" and c.norm_before_residual:
                    state[i] = rms_norm(state[i], p["midlayer.hidden_norm.weight"], c.rms_eps)
                hidden = state[i] + p[f"{name}.self_attn.o_proj.weight"] @ attended
                state[i] = hidden + _mlp(p, c, name, hidden)
        for i in range(T):
            if segments_T[i] == 0:
                continue
            normed = rms_norm(state[i], p["norm.weight"], c.rms_eps)
            logits_KTN[k, i] = p["lm_head.weight"] @ normed
            if c.norm_output:
                state[i] = normed
    return logits_KTN


def rollout(
    params: Params, config: Eagle3, embed_VH, tokens_BT, segments_BT, positions_BT, aux_BTAH, steps: int
) -> np.ndarray:
    """Draft logits [K, B, T, N], float64, of every step at every position; 0 where the position is padding.

    A token x[i+1+k] beyond the document is replaced by token 0: such an entry never counts.
    """
    rows = [
        _rollout_row(params, config, embed_VH, *row, steps)
        for row in zip(tokens_BT, segments_BT, positions_BT, aux_BTAH, strict=True)
    ]
    return np.stack(rows, 1)


class Losses(NamedTuple):
    """`steps` and `counted` are [K]; `total` is the sum over k of decay**k * steps[k]."""

    steps: np.ndarray
    counted: np.ndarray
    total: float


def _counts(segments_T, mask_T, i: int, k: int, compat: str | None) -> bool:
    """Whether position i counts at step k, whatever the draft vocabulary is."""
    if compat == "specforge":
        # Its mask is the input position's, not that of the predicted token.
        return same_document(segments_T, i, i + 1 + k) and bool(mask_T[i + k])
    assert compat is None, compat
    return same_document(segments_T, i, i + 2 + k) and bool(mask_T[i + 2 + k])


def losses(
    logits_KBTN, segments_BT, mask_BT, target_logits_BTV, draft_ids_N, compat=None, decay: float = 0.8
) -> Losses:
    """Soft cross entropy against the target's distribution renormalised over the draft vocabulary.

    Counted where the predicted token is an answer's, in the same document, and the target's argmax over the
    whole vocabulary is in the draft vocabulary. Divided by the counted positions, or by B * T in
    `compat="specforge"`.
    """
    K, B, T, _ = logits_KBTN.shape
    sums, counted = np.zeros(K), np.zeros(K, int)
    for k in range(K):
        for b in range(B):
            for i in range(T):
                if not _counts(segments_BT[b], mask_BT[b], i, k, compat):
                    continue
                teacher_V = target_logits_BTV[b, i + 1 + k]
                if teacher_V.argmax() not in draft_ids_N:
                    continue
                p_N = softmax(teacher_V[draft_ids_N])
                q_N = softmax(logits_KBTN[k, b, i])
                sums[k] -= (p_N * np.log(q_N)).sum()
                counted[k] += 1
    means = sums / (B * T) if compat else sums / np.maximum(counted, 1)
    return Losses(means, counted, float(sum(decay**k * means[k] for k in range(K))))


def metrics(logits_KBTN, segments_BT, mask_BT, target_logits_BTV, draft_ids_N) -> dict:
    """{acc, cond_acc, full_acc, alpha: [K]; coverage: float; counted: [K]}, and for both ways of the walk
    {length_greedy_by_k, accepted_greedy: [K], drafts: float}.

    Counted as in `losses`, save that a target outside the draft vocabulary counts, as a miss. A share of
    nothing is 0.
    """
    K, B, T, _ = logits_KBTN.shape
    greedy, sampled = np.zeros((2, B, T, K))
    acc, cond, full = ([[] for _ in range(K)] for _ in range(3))
    alpha: list[list] = [[] for _ in range(K)]
    covered = []
    for b in range(B):
        for i in range(T):
            all_counted = all_right = True  # of steps 0..k-1
            for k in range(K):
                if not _counts(segments_BT[b], mask_BT[b], i, k, None):
                    all_counted = False
                    continue
                teacher_V = target_logits_BTV[b, i + 1 + k]
                right = draft_ids_N[logits_KBTN[k, b, i].argmax()] == teacher_V.argmax()
                acc[k].append(right)
                p_full_N = softmax(teacher_V)[draft_ids_N]
                alpha[k].append(np.minimum(p_full_N, softmax(logits_KBTN[k, b, i])).sum())
                greedy[b, i, k], sampled[b, i, k] = right, alpha[k][-1]
                if k == 0:
                    covered.append(teacher_V.argmax() in draft_ids_N)
                if all_counted:
                    if all_right:
                        cond[k].append(right)
                    all_right = all_right and right
                    full[k].append(all_right)
    found = _summary(acc, cond, full, alpha, covered)
    for way, accept in (("greedy", greedy), ("sampled", sampled)):
        found |= {f"length_{way}_by_k": [], "drafts": 0.0}
        for k in range(1, K + 1):
            drafts, by_position = served(accept[..., :k], segments_BT, mask_BT)
            found[f"length_{way}_by_k"].append(1 + by_position.sum() / drafts)
            found[f"accepted_{way}"], found[f"drafts_{way}"] = by_position / drafts, drafts
    return found


def served(accept_BTK, segments_BT, mask_BT) -> tuple[float, np.ndarray]:
    """(drafts, accepted by position [K]) that a server is expected to need for all answers.

    `accept_BTK`: the probability that what index i drafts at step k is accepted. Backwards from the answer's
    end: drafting at i costs a draft and leads to i + m + 1 when just m tokens are accepted.
    """
    K = accept_BTK.shape[-1]
    total = np.zeros(1 + K)
    for b, (segments, mask) in enumerate(zip(segments_BT, mask_BT, strict=True)):
        for start, stop in answers_of(segments, mask):
            rest = np.zeros((stop + K + 1, 1 + K))  # [index]: drafts, accepted by position, from there on
            for i in range(stop - 3, start - 2, -1):  # the draft's first token is i + 2
                run = np.concatenate([[1.0], np.cumprod(accept_BTK[b, i])]) if i >= 0 else np.zeros(1 + K)
                rest[i] += run
                for m in range(K + 1):
                    rest[i] += (run[m] - (run[m + 1] if m < K else 0)) * rest[i + m + 1]
            first = start - 1 if start > 0 and segments[start - 1] == segments[start] else start
            total += rest[first]
    return total[0], total[1:]


def answers_of(segments_T, mask_T) -> list[tuple[int, int]]:
    """[start, stop) of every run of answer tokens of one document."""
    inside = (mask_T > 0) & (segments_T > 0)
    edges = [
        i
        for i in range(len(inside) + 1)
        if (i < len(inside) and inside[i]) != (i > 0 and inside[i - 1])
        or (0 < i < len(inside) and inside[i] and segments_T[i] != segments_T[i - 1])
    ]
    return [(start, stop) for start, stop in pairwise(edges) if inside[start]]


def _summary(acc, cond, full, alpha, covered) -> dict:
    def means(lists):
        return np.array([np.mean(values) if values else 0.0 for values in lists])

    out = {"acc": means(acc), "cond_acc": means(cond), "full_acc": means(full), "alpha": means(alpha)}
    out["coverage"] = means([covered])[0]
    out["counted"] = np.array([len(values) for values in acc])
    return out


def directional_derivative(
    fn: Callable[[Params], float], params: Params, direction: Params, eps=1e-5
) -> float:
    """Central difference of `fn` along `direction`; parameters it does not name stand still."""

    def moved(step):
        return {n: a + step * direction[n] if n in direction else a for n, a in params.items()}

    return (fn(moved(eps)) - fn(moved(-eps))) / (2 * eps)
