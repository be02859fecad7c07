"""Small random training inputs: packed documents of uneven lengths, several turns, a padded end.

Dimensions as in `reference.py`.
"""

from dataclasses import dataclass, replace

import numpy as np

from tests.train import reference
from train.heads.eagle3.head import Eagle3

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Problem:
    """Floats are float64. Shapes: embed and target_head [V, H], draft_ids [N] ascending, tokens, segments,
    positions and mask [B, T], aux [B, T, A, H], last [B, T, H]; target_logits = last @ target_head.T.
    """

    config: Eagle3
    params: dict[str, np.ndarray]
    embed: np.ndarray
    target_head: np.ndarray
    draft_ids: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    aux: np.ndarray
    last: np.ndarray

    @property
    def target_logits(self) -> np.ndarray:
        return self.last @ self.target_head.T

    def logits(self, steps: int, params=None) -> np.ndarray:
        rows = (self.tokens, self.segments, self.positions, self.aux)
        return reference.rollout(params or self.params, self.config, self.embed, *rows, steps)

    def losses(self, steps: int, params=None, compat=None) -> reference.Losses:
        return reference.losses(self.logits(steps, params), *self._targets, compat=compat)

    def metrics(self, steps: int) -> dict:
        return reference.metrics(self.logits(steps), *self._targets)

    @property
    def _targets(self):
        return self.segments, self.mask, self.target_logits, self.draft_ids

    def document(self, row: int, segment: int) -> "Problem":
        """One document alone, in a batch of one row without padding."""
        (where,) = np.nonzero(self.segments[row] == segment)
        names = ("tokens", "segments", "positions", "mask", "aux", "last")
        return replace(self, **{name: getattr(self, name)[row : row + 1, where] for name in names})


def head_config(rope=LLAMA3, aux=3) -> Eagle3:
    """Three query heads to each of three key/value heads; head_dim is not hidden_size / num_heads."""
    return Eagle3(
        hidden_size=10,
        target_hidden_size=10,
        num_heads=9,
        num_kv_heads=3,
        head_dim=4,
        ffn=14,
        draft_vocab_size=11,
        vocab_size=17,
        rms_eps=1e-5,
        rope_theta=1000.0,
        rope=rope,
        max_position=64,
        aux_layers=tuple(range(2, 2 + aux)),
        num_target_layers=9,
    )


def _lengths(rng, room: int) -> list[int]:
    """Document lengths that fill `room` exactly, with documents of 1 and of 2 among them."""
    lengths = [1, 2]
    while (left := room - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(3, 14))))
    return [int(n) for n in rng.permutation(lengths)]


def _turns(rng, length: int) -> np.ndarray:
    """A loss mask of alternating prompts and answers."""
    mask = []
    answer = bool(rng.integers(2))
    while len(mask) < length:
        mask += [int(answer)] * int(rng.integers(1, 4) if not answer else rng.integers(2, 9))
        answer = not answer
    return np.array(mask[:length])


def _packed(rng, B: int, T: int):
    """Segments, positions and loss masks; every second row, from the first, ends in padding."""
    segments, positions, mask = (np.zeros((B, T), np.int32) for _ in range(3))
    for b in range(B):
        start = 0
        for segment, length in enumerate(_lengths(rng, T - 4 if b % 2 == 0 else T), start=1):
            span = slice(start, start + length)
            segments[b, span] = segment
            positions[b, span] = np.arange(length)
            mask[b, span] = _turns(rng, length)
            start += length
    return segments, positions, mask.astype(np.uint8)


def problem(seed=3, B=2, T=40, rope=LLAMA3, **variant) -> Problem:
    """Random inputs on which the head is often, but not always, right: the target shares a tendency with it.

    Padding carries features and tokens too, so that whoever reads them is found out.
    """
    rng = np.random.default_rng(seed)
    c = replace(head_config(rope), **variant)
    params = {}
    for name, declared in c.parameters().items():
        noise = rng.normal(size=declared.shape)
        params[name] = 1 + 0.2 * noise if len(declared.shape) == 1 else 0.3 * noise
    draft_ids = np.sort(rng.permutation(c.vocab_size)[: c.draft_vocab_size])
    target_head = rng.normal(size=(c.vocab_size, c.hidden_size))
    for name in params:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            params[name] = params[name] / 3
    params["lm_head.weight"] = target_head[draft_ids] + 0.2 * rng.normal(size=params["lm_head.weight"].shape)
    segments, positions, mask = _packed(rng, B, T)
    tendency = 1.5 * rng.normal(size=(len(c.aux_layers), c.hidden_size))
    aux = tendency + 0.8 * rng.normal(size=(B, T, *tendency.shape))
    state = aux.reshape(B, T, -1) @ params["fc.weight"].T
    last = reference.rms_norm(state, params["norm.weight"], c.rms_eps)
    return Problem(
        config=c,
        params=params,
        embed=rng.normal(size=(c.vocab_size, c.hidden_size)),
        target_head=target_head,
        draft_ids=draft_ids,
        tokens=rng.integers(c.vocab_size, size=(B, T)).astype(np.int32),
        segments=segments,
        positions=positions,
        mask=mask,
        aux=aux,
        last=last + 0.5 * rng.normal(size=last.shape),
    )
