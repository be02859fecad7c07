"""Weights lie divided over the chips that compute different rows, and are gathered where they are used.

A batch job has so many tokens a chip that a layer's weights arrive in less time than it takes to compute with
them, and no activation crosses a wire. Of a layer with experts only those are divided (see weights.py).
Sources: "weight-gathered" in arXiv 2211.05102; ZeRO-3, arXiv 1910.02054, known as fully sharded data
parallelism.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax

from common.mesh import RULES
from common.params import Param

AXIS = "fsdp"  # logical; see common/mesh.py


def divided(param: Param, lead: int, chips: int, axis: str = AXIS) -> Param:
    """The parameter with one dimension divided over the `chips` of an axis, where they divide one.

    The first `lead` dimensions stay whole: the scan of layers goes over them. So do vectors, which are tiny.
    """
    if chips == 1 or len(param.shape) - lead < 2:
        return param
    for i in range(lead, len(param.shape)):
        if param.axes[i] is None and param.shape[i] % chips == 0:
            return replace(param, axes=(*param.axes[:i], axis, *param.axes[i + 1 :]))
    return param


def gathered(w: Mapping[str, jax.Array], axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, jax.Array]:
    """The weights as they are computed with: whole over the chips that compute different rows.

    Quantised weights travel as they are stored. To be called inside a shard_map.
    """

    def whole(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if AXIS not in axes:
            return x
        return jax.lax.all_gather(x, RULES[AXIS], axis=axes.index(AXIS), tiled=True)

    return {name: whole(x, axes[name]) for name, x in w.items()}


def own_part(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """This chip's part of a whole weight: what `gathered` puts together."""
    if AXIS not in axes:
        return x
    at = axes.index(AXIS)
    size = x.shape[at] // jax.lax.axis_size(RULES[AXIS])
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(RULES[AXIS]) * size, size, at)
