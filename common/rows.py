"""Arrays [B, ...] that are divided by row over a mesh, and what of them this process has."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common.mesh import sharding, ways


class Rows:
    """A division of rows over a mesh. A chip's rows follow each other, wherever the mesh put the chip.

    `axes` are those of the table by which the first dimensions are divided: rows over all chips, or rows over
    groups of chips ("batch") each of which has some of their positions ("position").
    """

    def __init__(self, mesh: Mesh, axes: tuple[str, ...] = ("row",)):
        self._mesh, self._axes = mesh, axes
        self._divided = tuple(ways(mesh, axis) for axis in axes)
        places = sharding(mesh, axes).addressable_devices_indices_map(self._divided)
        place = {chip: tuple(part.start or 0 for part in index) for chip, index in places.items()}
        self._chips = sorted(place, key=place.__getitem__)
        self._places = [place[chip] for chip in self._chips]
        self._groups = sorted({group for group, *_ in self._places})
        self._shardings: dict[tuple[str | None, ...], NamedSharding] = {}

    @property
    def chips(self) -> int:
        """How many chips this process has."""
        return len(self._chips)

    def own(self, values: np.ndarray) -> np.ndarray:
        """The rows of [B, ...] of which this process has any part, in the order of its chips."""
        parts = values.reshape(self._divided[0], -1, *values.shape[1:])
        return parts[self._groups].reshape(-1, *values.shape[1:])

    def cut(self, own: np.ndarray) -> list[np.ndarray]:
        """What each chip of this process has of its rows [b, ...]."""
        parts = own.reshape(len(self._groups), -1, *own.shape[1:])
        found = []
        for group, *pieces in self._places:
            part = parts[self._groups.index(group)]
            for piece, count in zip(pieces, self._divided[1 : part.ndim], strict=False):
                size = part.shape[1] // count
                part = part[:, piece * size : (piece + 1) * size]
            found.append(part)
        return found

    def place(self, own: Sequence[np.ndarray], by_chip: Sequence[np.ndarray] = ()) -> list[jax.Array]:
        """Arrays [B, ...] on the mesh, of each of which every process gives its own rows [b, ...], and behind
        them those whose first dimension is divided by chip, of which it gives its own chips' parts. All go to
        the chips at once, for each time costs the same however small an array is."""
        parts = [self.cut(one) for one in own] + [np.split(one, self.chips) for one in by_chip]
        held = jax.device_put(parts, [self._chips] * len(parts))
        whole = [(len(one) // len(self._groups) * self._divided[0], *one.shape[1:]) for one in own]
        whole += [(len(one) // self.chips * self._mesh.size, *one.shape[1:]) for one in by_chip]
        axes = [self._axes] * len(own) + [("chip",)] * len(by_chip)
        return [
            jax.make_array_from_single_device_arrays(shape, self._where(along, len(shape)), on_chips)
            for shape, along, on_chips in zip(whole, axes, held, strict=True)
        ]

    def _where(self, axes: tuple[str, ...], dimensions: int) -> NamedSharding:
        """How an array of so many dimensions lies; always the same object, which knows its chips already."""
        axes = (axes + (None,) * dimensions)[:dimensions]
        if axes not in self._shardings:
            self._shardings[axes] = sharding(self._mesh, axes)
        return self._shardings[axes]
