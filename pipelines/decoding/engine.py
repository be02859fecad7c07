"""Continuous batching: a target with a few slots, each with an answer of its own that grows with every step.

A slot is taken by the next prompt as soon as its answer ends. Shapes are static: there is one program for
steps, and one each for prompts of up to 64, 128, 256, ... tokens.

Dimensions: B slots, d tokens a step at most.
"""

import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from dump.plan import positions_limit
from pipelines.decoding import steps
from pipelines.decoding.drafting import Drafter, Drafting
from pipelines.decoding.sampling import Sampling

_SHORTEST = 64  # positions that a prompt is computed in


class Engine:
    """`slots` answers at once; a prompt and its answer have up to `length` tokens together.

    With `drafting` the `drafter`'s head drafts. EyasError for a tree on a target that cannot read one.
    """

    def __init__(
        self,
        cfg: target.TargetConfig,
        weights: dict[str, jax.Array],
        slots: int,
        length: int,
        sampling: Sampling,
        drafting: Drafting | None = None,
        drafter: Drafter | None = None,
    ):
        self.length = length
        how = steps.How(cfg, sampling, drafting)
        self._weights = steps.Weights(weights, drafter)
        self._held = steps.nothing(how, slots, length, weights["norm"].dtype)
        self._free = list(range(slots))
        # By slot: the last token, its position, the next one's number in the answer, and the answer's seed.
        self._token, self._start, self._number, self._seed = np.zeros((4, slots), np.int32)
        self._prefill = jax.jit(partial(steps.prefill, how), donate_argnums=1)
        self._step = jax.jit(partial(steps.step, how), donate_argnums=1)
        self._programs: dict[Any, Any] = {}
        self.compiling = 0.0  # seconds that it took to compile the programs

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
        token = self._run(self._prefill, padded, *about)
        self._token[slot], self._start[slot] = int(token[0]), len(prompt)
        self._number[slot], self._seed[slot] = 1, seed
        return slot, int(token[0])

    def step(self) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens [B, d] of all slots, and how many of them they are [B]; those of a free slot mean
        nothing.

        A slot must end as soon as its prompt and answer have `length` tokens.
        """
        given = (x.copy() for x in (self._token, self._start, self._seed, self._number))
        found = self._run(self._step, *given)
        tokens, counts = np.array(found.tokens_Bd), np.array(found.counts_B)
        self._token = np.take_along_axis(tokens, counts[:, None] - 1, 1)[:, 0]
        taken = counts.copy()
        taken[self._free] = 0
        self._start += taken
        self._number += taken
        return tokens, counts

    def end(self, slot: int) -> None:
        """The slot is free."""
        self._start[slot] = 0  # so that no step reads more of the cache for its sake
        self._free.append(slot)

    def _run(self, fn: Any, *given: np.ndarray) -> Any:
        """What a program gives; it is compiled when it is first needed."""
        key = fn, *(x.shape for x in given)
        if key not in self._programs:
            start = time.monotonic()
            self._programs[key] = fn.lower(self._weights, self._held, *given).compile()
            self.compiling += time.monotonic() - start
        found, self._held = self._programs[key](self._weights, self._held, *given)
        return found


def on_one_device(folder: str, cfg: target.TargetConfig, dtype: str) -> dict[str, jax.Array]:
    """A target's weights, as an engine takes them. EyasError for more than the first device has room for."""
    declared = target.parameters(cfg).values()
    size = sum(math.prod(p.shape) * np.dtype(p.dtype or dtype).itemsize for p in declared)
    room = _device_memory()
    if room is not None and size > room:
        raise EyasError(
            f"{folder} has {size / 2**30:.1f} GiB of weights in {dtype}, and the first device has room for "
            f"{room / 2**30:.1f}; a target that decodes here must fit one device, serve a larger one"
        )
    loaded = target.load(folder, cfg, make_mesh(), jnp.dtype(dtype))
    return {name: x.addressable_data(0) for name, x in loaded.items()}


def _device_memory() -> int | None:
    """Bytes of the first device, None where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def require_length(cfg: target.TargetConfig, folder: str, length: int) -> None:
    """EyasError if the target of a folder is made for sequences of less than `length` tokens."""
    limit = min(n for n in (positions_limit(cfg.text), cfg.max_length, length) if n is not None)
    if limit < length:
        raise EyasError(f"length={length}, but {folder} is made for {limit} tokens; give --length {limit}")


def _padded(length: int, most: int) -> int:
    """The size that a prompt is computed in: few sizes are compiled."""
    size = _SHORTEST
    while size < length:
        size *= 2
    return min(size, most)
