"""One table from logical axes to mesh axes; nothing else in the project names a mesh axis.

The mesh is (dp, tp). `dp` splits rows; a target's weights lie divided over it as well ("fsdp") and are
gathered, layer by layer, where they are used. `tp` splits a target's heads, feed-forward width, vocabulary
and experts; while a head is trained it splits the positions of rows that are too long for one chip.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import EyasError

RULES: dict[str, str | tuple[str, str] | None] = {
    "row": ("dp", "tp"),  # rows as they are read and written: over every chip
    "batch": "dp",  # rows while they are computed
    "position": "tp",  # of a row that a head is trained on
    "heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
    "expert": "tp",
    "fsdp": "dp",
    "chip": ("dp", "tp"),  # what each chip has of its own, a part of every weight of a head in training too
}


def make_mesh(dp: int = 1, tp: int = 1, option: str = "tp") -> Mesh:
    """A (dp, tp) mesh of the first dp*tp devices, axes Explicit: a wrong sharding fails at trace time.

    `option`: what the user calls the second number. EyasError when there are fewer devices, and when several
    processes would leave some idle.
    """
    devices = jax.devices()
    if dp * tp > len(devices):
        raise EyasError(
            f"dp={dp} x {option}={tp} needs {dp * tp} devices, found {len(devices)}; give a smaller --dp or "
            f"--{option}"
        )
    if jax.process_count() > 1 and dp * tp != len(devices):
        raise EyasError(
            f"dp*{option}={dp * tp}, but the {jax.process_count()} processes have {len(devices)} chips; all "
            f"of them must take part: change --dp or --{option}"
        )
    return jax.make_mesh((dp, tp), ("dp", "tp"), devices=devices[: dp * tp])


def ways(mesh: Mesh, axis: str) -> int:
    """Over how many chips a logical axis is divided."""
    names = RULES[axis] or ()
    return math.prod(mesh.shape[name] for name in ([names] if isinstance(names, str) else names))


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes (None: replicated)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """`spec(axes)` on a mesh."""
    return NamedSharding(mesh, spec(axes))
