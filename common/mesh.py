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


# Found with the TPU compiler's own estimates: more fast memory for a matmul's tiles, and weights that arrive
# while the matmuls before them run.
_TPU_OPTIONS = {
    "xla_tpu_scoped_vmem_limit_kib": "98304",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
# XLA's own matmuls can carry a gathering inside of them; kernels can't. Sparse cores gather beside anything.
_BY_SPARSE_CORES = {
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_enable_instruction_fusion": "false",
    "xla_sc_disable_megacore_partitioning": "true",
    # Sparse cores do one thing after another: behind small scatters of experts gatherings would start late.
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
_SPARSE_CORES = ("TPU v6 lite",)  # kinds of chips that have them and for which this was compiled


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


# XLA takes half of what a CPU with AVX-512 has, and an exponential then takes twice as long.
_CPU_OPTIONS = {"xla_cpu_prefer_vector_width": "512"}


def compiler_options(mesh: Mesh, kernels: bool = False) -> dict[str, str]:
    """What `compile` is told for the chips of a mesh. `kernels`: most weights are those of Pallas kernels."""
    chip = mesh.devices.flat[0]
    if chip.platform != "tpu":
        return _CPU_OPTIONS if chip.platform == "cpu" else {}
    return _TPU_OPTIONS | (_BY_SPARSE_CORES if kernels and chip.device_kind in _SPARSE_CORES else {})


def training_options(mesh: Mesh) -> dict[str, str]:
    """What `compile` is told of a training step: on TPUs more fast memory for a matmul's tiles.

    The other options for a target's pass took the compiler too long with a step's many loops.
    """
    name = "xla_tpu_scoped_vmem_limit_kib"
    return {name: _TPU_OPTIONS[name]} if mesh.devices.flat[0].platform == "tpu" else {}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical axes (None: replicated)."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """`spec(axes)` on a mesh."""
    return NamedSharding(mesh, spec(axes))
