"""One table from logical axes to mesh axes; nothing else in the project names a mesh axis.

The mesh is (dp, tp): `dp` splits rows, `tp` splits heads, feed-forward width, vocabulary and experts.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import EyasError

RULES: dict[str, str | tuple[str, str] | None] = {
    "row": ("dp", "tp"),  # rows as they are read and written: over every chip
    "batch": "dp",  # rows while the target computes
    "heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
    "expert": "tp",
}


def make_mesh(dp: int = 1, tp: int = 1) -> Mesh:
    """A (dp, tp) mesh of the first dp*tp devices, axes Explicit: a wrong sharding fails at trace time.

    EyasError when there are fewer devices.
    """
    devices = jax.devices()
    if dp * tp > len(devices):
        raise EyasError(
            f"dp={dp} x tp={tp} needs {dp * tp} devices, found {len(devices)}; give a smaller --dp or --tp"
        )
    return jax.make_mesh((dp, tp), ("dp", "tp"), devices=devices[: dp * tp])


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes (None: replicated)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """`spec(axes)` on a mesh."""
    return NamedSharding(mesh, spec(axes))
