"""Arrays [B, ...] that are divided by row over all chips, and what of them this process has."""

import jax
import numpy as np
from jax.sharding import Mesh

from common.mesh import sharding


class Rows:
    """A division of rows over a mesh. A chip's rows follow each other, wherever the mesh put the chip."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        places = sharding(mesh, ("row",)).addressable_devices_indices_map((mesh.size,))
        place = {chip: index[0].start or 0 for chip, index in places.items()}
        self._chips = sorted(place, key=place.__getitem__)
        self._places = [place[chip] for chip in self._chips]

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

    def place(self, own: np.ndarray) -> jax.Array:
        """[B, ...] on the mesh, of which every process gives its own rows [b, ...]."""
        parts = np.split(own, self.chips)
        held = [jax.device_put(part, chip) for part, chip in zip(parts, self._chips, strict=True)]
        shape = (len(own) // self.chips * self._mesh.size, *own.shape[1:])
        where = sharding(self._mesh, ("row",) + (None,) * (own.ndim - 1))
        return jax.make_array_from_single_device_arrays(shape, where, held)
