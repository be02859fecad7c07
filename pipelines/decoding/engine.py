"""Continuous batching: a target with a few slots, each with an answer of its own that grows a token a step.

A slot is taken by the next prompt as soon as its answer ends. Shapes are static: there is one program for
steps, and one each for prompts of up to 64, 128, 256, ... tokens.

Dimensions: B slots, T tokens of a prompt.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dump import target
from dump.target import decoding
from pipelines.decoding.sampling import Sampling, choose

_SHORTEST = 64  # positions that a prompt is computed in


class Engine:
    """`slots` answers at once; a prompt and its answer have up to `length` tokens together."""

    def __init__(
        self,
        cfg: target.TargetConfig,
        weights: dict[str, jax.Array],
        slots: int,
        length: int,
        sampling: Sampling,
    ):
        self.length = length
        self._weights = weights
        self._cache = decoding.empty_cache(cfg, slots, length, weights["norm"].dtype)
        self._free = list(range(slots))
        # By slot: the last token, its position, its number in the answer, and the answer's seed.
        self._token, self._start, self._number, self._seed = np.zeros((4, slots), np.int32)
        self._prefill = jax.jit(partial(_prefill, cfg, sampling), donate_argnums=1)
        self._step = jax.jit(partial(_step, cfg, sampling), donate_argnums=1)

    @property
    def free(self) -> int:
        """How many prompts can begin now."""
        return len(self._free)

    def begin(self, prompt: list[int], seed: int) -> tuple[int, int]:
        """(slot, first token) of the answer to a prompt of less than `length` tokens; a slot must be free.

        `seed` has 31 bits.
        """
        assert 0 < len(prompt) < self.length, len(prompt)
        slot = self._free.pop()
        padded = np.zeros((1, _padded(len(prompt), self.length)), np.int32)
        padded[0, : len(prompt)] = prompt
        about = (np.array([n], np.int32) for n in (len(prompt), slot, seed))
        token, self._cache = self._prefill(self._weights, self._cache, padded, *about)
        self._token[slot], self._start[slot] = int(token[0]), len(prompt)
        self._number[slot], self._seed[slot] = 1, seed
        return slot, int(token[0])

    def step(self) -> np.ndarray:
        """The next token [B] of all slots; that of a free one means nothing.

        A slot must end before its prompt and answer have more than `length` tokens.
        """
        given = (x.copy() for x in (self._token, self._start, self._seed, self._number))
        tokens, self._cache = self._step(self._weights, self._cache, *given)
        self._token = np.array(tokens)
        taken = np.ones(len(self._token), np.int32)
        taken[self._free] = 0
        self._start += taken
        self._number += taken
        return self._token.copy()

    def end(self, slot: int) -> None:
        """The slot is free."""
        self._start[slot] = 0  # so that no step reads more of the cache for its sake
        self._free.append(slot)


def _padded(length: int, most: int) -> int:
    """The size that a prompt is computed in: few sizes are compiled."""
    size = _SHORTEST
    while size < length:
        size *= 2
    return min(size, most)


def _prefill(cfg, sampling: Sampling, weights, cache, tokens_1T, length_1, slot_1, seed_1) -> tuple[Any, Any]:
    _, last_1TH, cache = decoding.prefill(cfg, weights, cache, tokens_1T, length_1, slot_1)
    last_1H = jnp.take_along_axis(last_1TH, length_1[:, None, None] - 1, 1)[:, 0]
    return choose(sampling, target.logits(cfg, weights, last_1H), seed_1, jnp.zeros_like(seed_1)), cache


def _step(cfg, sampling: Sampling, weights, cache, tokens_B, starts_B, seeds_B, numbers_B) -> tuple[Any, Any]:
    _, last_B1H, cache = decoding.step(cfg, weights, cache, tokens_B[:, None], starts_B)
    return choose(sampling, target.logits(cfg, weights, last_B1H[:, 0]), seeds_B, numbers_B), cache
