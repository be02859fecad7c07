"""What XLA is told for the chips that a program is compiled for."""

from jax.sharding import Mesh

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

    The other options for a target's pass took the compiler too long with a step's many loops. On CPUs wider
    vectors change nothing of a step (4.77 CPU seconds beside 4.80 of the one in `make bench`).
    """
    name = "xla_tpu_scoped_vmem_limit_kib"
    return {name: _TPU_OPTIONS[name]} if mesh.devices.flat[0].platform == "tpu" else {}
