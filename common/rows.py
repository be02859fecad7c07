"""Arrays [B, ...] that are divided by row over all chips, and what of them this process has."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common.mesh import sharding


class Rows:
    """A division of rows over a mesh. A chip's rows follow each other, wherever the mesh put the chip."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        places = sharding(mesh, ("row",)).addressable_devices_indices_map((mesh.size,))
        place = {chip: index[0].start or 0 for chip, index in places.items()}
        self._chips = sorted(place, key=place.__getitem__)
        self._places = [place[chip] for chip in self._chips]
        self._shardings: dict[int, NamedSharding] = {}

    @property
    def chips(self) -> int:
        """How many chips this process has."""
        return len(self._chips)

    @property
    def all_chips(self) -> int:
        """How many all processes have."""
        return self._mesh.size

    def own(self, values: np.ndarray) -> np.ndarray:
        """The rows of [B, ...] that are this process's, in the order of its chips."""
        parts = values.reshape(self._mesh.size, -1, *values.shape[1:])
        return parts[self._places].reshape(-1, *values.shape[1:])

    def place(self, own: Sequence[np.ndarray]) -> list[jax.Array]:
        """Arrays [B, ...] on the mesh, of each of which every process gives its own rows [b, ...]. All go to
        the chips at once, for each time costs the same however small an array is."""
        parts = [np.split(one, self.chips) for one in own]
        held = jax.device_put(parts, [self._chips] * len(parts))
        return [
            jax.make_array_from_single_device_arrays(
                (len(one) // self.chips * self._mesh.size, *one.shape[1:]), self._where(one.ndim), on_chips
            )
            for one, on_chips in zip(own, held, strict=True)
        ]

    def _where(self, dimensions: int) -> NamedSharding:
        """How an array of so many dimensions lies; always the same object, which knows its chips already."""
        if dimensions not in self._shardings:
            self._shardings[dimensions] = sharding(self._mesh, ("row",) + (None,) * (dimensions - 1))
        return self._shardings[dimensions]
