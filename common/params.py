"""Parameters are declared once: name, shape, logical axes, initialiser; everything else is derived.

A model's parameters are a flat `{name: array}` dict; its declaration is a flat `{name: Param}` dict.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.errors import EyasError
from common.mesh import sharding


@dataclass(frozen=True)
class Param:
    """One parameter. `axes` names a logical axis (see common/mesh.py) or None for each dimension."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # "normal" is N(0, 0.02); "ones"; "zeros"
    dtype: Any = None  # None: the model's own dtype

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


Declaration = dict[str, Param]


def shapes(declared: Declaration, dtype: Any, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """ShapeDtypeStructs of every parameter, with its sharding when a mesh is given."""
    return {
        name: jax.ShapeDtypeStruct(
            p.shape, p.dtype or dtype, sharding=None if mesh is None else sharding(mesh, p.axes)
        )
        for name, p in declared.items()
    }


def initialise(declared: Declaration, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Fresh parameters; each one's key depends on `key` and its place in the sorted names only."""
    made = {}
    for number, name in enumerate(sorted(declared)):
        p = declared[name]
        kind = p.dtype or dtype
        if p.init == "normal":
            made[name] = (0.02 * jax.random.normal(jax.random.fold_in(key, number), p.shape)).astype(kind)
        else:
            made[name] = {"ones": jnp.ones, "zeros": jnp.zeros}[p.init](p.shape, kind)
    return made


def check(declared: Declaration, found: dict[str, Any], where: str) -> None:
    """EyasError naming the first missing, surplus or mis-shaped array of `found` (anything with .shape)."""
    for name in sorted(declared.keys() - found.keys()):
        raise EyasError(f"{where} lacks {name} {list(declared[name].shape)}; the file is not this model's")
    for name in sorted(found.keys() - declared.keys()):
        raise EyasError(f"{where} has an unexpected {name}; the file is not this model's")
    for name, p in declared.items():
        if tuple(found[name].shape) != p.shape:
            raise EyasError(f"{where}: {name} has shape {list(found[name].shape)}, expected {list(p.shape)}")
