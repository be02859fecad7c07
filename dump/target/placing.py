"""Tensors of a checkpoint become one array on a mesh, a bounded piece at a time.

The host holds some pieces that are read ahead and nothing else: a weight is put together where it will stay.
Boxes are ((start, stop), …) in the order of the file, which is that of memory but for transposed matrices.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from common.safetensors import Checkpoint

PIECE = 16 << 20  # bytes read at once
AHEAD = 16  # pieces read ahead: with what is being read, well under 1 GiB of the host's memory
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Source:
    """A weight of `shape` (in memory) stacked from the tensors `names` [*lead], each `inner` in the file."""

    names: np.ndarray
    inner: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool  # memory holds the last two dimensions the other way round

    def order(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """Dimensions of memory as those of the file, or the other way round."""
        return (*index[:-2], index[-1], index[-2]) if self.transposed else tuple(index)


class Placing:
    """One weight on its way to the chips of this process."""

    def __init__(self, checkpoint: Checkpoint, source: Source, dtype: np.dtype, target: NamedSharding):
        self._checkpoint, self._source, self._dtype, self._target = checkpoint, source, dtype, target
        sample = checkpoint.tensors[source.names.flat[0]].dtype
        full = source.names.shape + source.inner
        self._boxes: dict[jax.Device, Box] = {}
        for device, index in target.addressable_devices_indices_map(source.shape).items():
            bounds = zip(source.order(index), full, strict=True)
            self._boxes[device] = tuple(s.indices(n)[:2] for s, n in bounds)
        self._pieces = _pieces(set(self._boxes.values()), sample.itemsize)
        self.nbytes = sum(_size(piece) for piece in self._pieces) * sample.itemsize

    def run(self, pool: Executor, done: Callable[[int], None]) -> jax.Array:
        """The weight; `done` is told the bytes of every piece. EyasError when a file ends early."""
        held: dict[jax.Device, jax.Array] = {}
        for piece, value in _ahead(pool, self._read, self._pieces):
            for device, box in self._boxes.items():
                self._put(held, device, box, piece, value)
            jax.block_until_ready(list(held.values()))  # nothing waits on the host
            done(value.nbytes)
        arrays = [held[device] for device in self._boxes]
        return jax.make_array_from_single_device_arrays(self._source.shape, self._target, arrays)

    def _read(self, piece: Box) -> np.ndarray:
        lead = self._source.names.ndim
        inner = tuple(slice(*bounds) for bounds in piece[lead:])
        places = list(itertools.product(*(range(*bounds) for bounds in piece[:lead])))
        parts = (self._checkpoint.read(self._source.names[place], inner) for place in places)
        if len(places) == 1:
            return next(parts).reshape(_shape(piece))
        first = next(parts)
        out = np.empty((len(places), *first.shape), first.dtype)
        for number, part in enumerate(itertools.chain([first], parts)):
            out[number] = part
        return out.reshape(_shape(piece))

    def _put(self, held: dict, device: jax.Device, box: Box, piece: Box, value: np.ndarray) -> None:
        """Writes the chip's share of a piece into its part of the weight."""
        common = _meet(box, piece)
        if common is None:
            return
        part = value[tuple(slice(a - p, b - p) for (a, b), (p, _) in zip(common, piece, strict=True))]
        if common == box:
            part = part.astype(self._dtype, copy=False)
            held[device] = jax.device_put(part.swapaxes(-1, -2) if self._source.transposed else part, device)
            return
        if device not in held:
            held[device] = jnp.zeros(self._source.order(_shape(box)), self._dtype, device=device)
        start = self._source.order([a - b for (a, _), (b, _) in zip(common, box, strict=True)])
        held[device] = _write(held[device], jax.device_put(part, device), start, self._source.transposed)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _write(whole: jax.Array, part: jax.Array, start: tuple[int, ...], transposed: bool) -> jax.Array:
    """In place. As whole numbers of the same size: CPUs would compute the update of all of `whole` in float32
    for types that they lack."""
    bits = _BITS[whole.dtype.itemsize]
    part = (part.swapaxes(-1, -2) if transposed else part).astype(whole.dtype)
    whole_bits, part_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (whole, part))
    updated = jax.lax.dynamic_update_slice(whole_bits, part_bits, start)
    return jax.lax.bitcast_convert_type(updated, whole.dtype)


def _pieces(boxes: set[Box], itemsize: int) -> list[Box]:
    """Boxes of at most about PIECE bytes that together cover `boxes`, no part of them twice."""
    around = _around(boxes)
    sizes = _shape(around)
    axis = next((i for i in range(len(sizes)) if math.prod(sizes[i + 1 :]) * itemsize <= PIECE), len(sizes))
    if axis == len(sizes):  # a single number
        return [around]
    step = max(1, PIECE // (math.prod(sizes[axis + 1 :]) * itemsize))
    steps = [1] * axis + [step] + list(sizes[axis + 1 :])
    cuts = [
        [(a, min(a + n, stop)) for a in range(start, stop, n)]
        for (start, stop), n in zip(around, steps, strict=True)
    ]
    found = []
    for piece in itertools.product(*cuts):
        if wanted := {part for box in boxes if (part := _meet(box, piece))}:
            found.append(_around(wanted))
    return found


def _ahead(pool: Executor, read: Callable, pieces: list[Box]) -> Iterator[tuple[Box, np.ndarray]]:
    waiting: deque = deque()
    for piece in pieces:
        waiting.append((piece, pool.submit(read, piece)))
        if len(waiting) > AHEAD:
            first, value = waiting.popleft()
            yield first, value.result()
    while waiting:
        first, value = waiting.popleft()
        yield first, value.result()


def _around(boxes: set[Box]) -> Box:
    return tuple(
        (min(a for a, _ in bounds), max(b for _, b in bounds)) for bounds in zip(*boxes, strict=True)
    )


def _meet(a: Box, b: Box) -> Box | None:
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _size(box: Box) -> int:
    return math.prod(_shape(box))
