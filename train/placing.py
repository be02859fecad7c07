"""Where the arrays of training lie: rows over the chips, weights and moments divided over the same chips.

A chip gathers a weight in the type that it computes in when it is used, and gives the sum of all chips'
gradients back in float32, each chip its part. Sources: ZeRO-3, arXiv 1910.02054, and PyTorch's FSDP, arXiv
2304.11277. A vector, and a matrix that has no dimension which the chips divide, lies whole on each.

The frozen embedding is divided by columns and never gathered: chips exchange the few rows that they need.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common import pod
from common.fsdp import divided
from common.mesh import RULES, sharding, spec, ways
from common.params import Declaration, Param
from train.batch import AXIS, Batch, Frozen, Params

_BY_CHIP, _BY_ROW = ("live", "targets", "count", "samples"), ("row", "draws")


def layout(declared: Declaration, mesh: Mesh) -> Declaration:
    """The parameters with the axes by which they lie on a mesh."""
    return {name: divided(p, 0, ways(mesh, AXIS), AXIS) for name, p in declared.items()}


def _shardings(laid: Declaration, mesh: Mesh) -> dict[str, NamedSharding]:
    return {name: sharding(mesh, p.axes) for name, p in laid.items()}


def along(tree: Any, declared: Declaration, mesh: Mesh) -> Any:
    """The shardings of `tree`: an array that has a parameter's name and shape lies as that parameter does,
    everything else whole on every chip."""
    laid = layout(declared, mesh)
    where = _shardings(laid, mesh)

    def of(path: Any, x: Any) -> NamedSharding:
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
        return where[name] if name in laid and laid[name].shape == x.shape else sharding(mesh, ())

    return jax.tree_util.tree_map_with_path(of, tree)


def frozen_axes(frozen: Frozen, mesh: Mesh) -> Frozen:
    """The logical axes of every array of `frozen`, of which only the shapes are looked at."""
    chips = ways(mesh, AXIS)
    rows = divided(Param((1, frozen.embed.shape[1]), (None, None)), 0, chips, AXIS).axes
    if frozen.lm_head is None:
        return Frozen(rows, None, (None,))
    return Frozen(rows, divided(Param(frozen.lm_head.shape, (None, None)), 0, chips, AXIS).axes, (None,))


def place(value: np.ndarray, where: NamedSharding, dtype: Any = None) -> jax.Array:
    """A host's array on the mesh, in `dtype` if that is given; every process has all of it."""
    return jax.make_array_from_callback(
        value.shape, where, lambda index: value[index].astype(dtype or value.dtype, copy=False)
    )


def on_host(params: Params, dtype: Any) -> dict[str, np.ndarray]:
    """The whole parameters in another type, on the first process; {} on the others, which take part."""
    found = {}
    for name, x in params.items():
        whole = jax.sharding.reshard(x.astype(dtype), NamedSharding(x.sharding.mesh, spec(())))
        if pod.is_first():
            found[name] = np.asarray(whole)
    return found


def in_specs(declared: Declaration, frozen: Frozen, mesh: Mesh) -> tuple[Any, Any]:
    """What a shard_map is told of parameters and frozen arrays."""
    axes = frozen_axes(frozen, mesh)
    params = {name: spec(p.axes) for name, p in layout(declared, mesh).items()}
    return params, Frozen(*(None if a is None else spec(a) for a in axes))


def batch_specs(batch: Batch) -> Batch:
    """What a shard_map is told of a batch, of which only what is there is looked at."""

    def of(name: str) -> Any:
        axes = ("chip",) if name in _BY_CHIP else ("batch",) if name in _BY_ROW else ("batch", "position")
        return None if getattr(batch, name) is None else spec(axes)

    return Batch(**{name: of(name) for name in Batch._fields})


def gathered(
    params: Params, frozen: Frozen, declared: Declaration, axes: Frozen, dtype: Any
) -> tuple[Params, Frozen]:
    """The parameters as they are computed with, matrices in `dtype`; their gradients are sums over all chips.

    `declared` as `layout` gives it. To be called inside a shard_map.
    """
    found = {
        name: _whole(x, _at(declared[name].axes), jnp.dtype(dtype) if x.ndim > 1 else x.dtype)
        for name, x in params.items()
    }
    if frozen.lm_head is not None and (at := _at(axes.lm_head)) is not None:
        rows = jax.lax.all_gather(frozen.lm_head, RULES[AXIS], axis=at, tiled=True)
        frozen = frozen._replace(lm_head=rows)
    return found, frozen


def summed(x: jax.Array) -> jax.Array:
    """The sum over all chips. To be called inside a shard_map. Over a single chip nothing is summed: XLA for
    CPU would hold all gradients twice."""
    several = tuple(name for name in RULES[AXIS] if jax.lax.axis_size(name) > 1)
    return jax.lax.psum(x, several) if several else x


def _at(axes: tuple[str | None, ...]) -> int | None:
    """Which dimension is divided."""
    return axes.index(AXIS) if AXIS in axes else None


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(x: jax.Array, at: int | None, dtype: Any) -> jax.Array:
    x = x.astype(dtype)
    return x if at is None else jax.lax.all_gather(x, RULES[AXIS], axis=at, tiled=True)


def _back(at: int | None, dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    g = g.astype(jnp.float32)
    if at is None:
        return (summed(g),)
    return (jax.lax.psum_scatter(g, RULES[AXIS], scatter_dimension=at, tiled=True),)


_whole.defvjp(lambda x, at, dtype: (_whole(x, at, dtype), None), _back)
