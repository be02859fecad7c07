"""How near the dump comes to a TPU's peak, by the TPU compiler's own estimates: no TPU is needed.

    python -m pipelines.bench.tpu RECIPE    prints what it expects of one batch, as JSON

The program is the dump's own, compiled for the recipe's slice. Time is the sum of the compiler's cycles, of
collectives that nothing overlaps, and of kernels, which carry no estimate and are priced at half of the peak.
Where collectives beside other work take longer than that work, they are the time. Gathers of rows carry no
estimate either: what they would take at HBM's rate is told beside, and not in the sum.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from common import storage
from common.codec import Codec
from common.params import shapes
from common.progress import note
from common.splash import BLOCK
from common.texts import install
from dump import target
from dump.config import DumpConfig
from dump.prefill import Program
from dump.target import deltakernel
from dump.target.deltanet import DeltaNet
from dump.target.deltarule import CHUNK
from dump.target.flops import attention_flops, expert_flops, needed_flops
from pipelines import recipes
from pipelines.bench.hlo import Work, work
from pipelines.bench.published import PUBLISHED

BARS = {
    "qwen3-32b": 0.55,
    "llama-3.1-8b": 0.55,
    "qwen3-30b-a3b": 0.30,
    "glm-4.7-flash": 0.30,
    "qwen3-next-80b-a3b": 0.30,
}
CHIPS_A_HOST = 4
KERNELS = 0.5  # of the peak, by which kernels are priced
_SECONDS = 3600  # that a compilation may take


@dataclass(frozen=True)
class Chip:
    """bfloat16 FLOPs, cycles and bytes (over one axis of the mesh of chips, both ways) a second."""

    flops: float
    cycles: float
    wire: float
    hbm: float  # bytes a second
    hbm_gib: float  # that programs can have
    slices: dict[int, str]  # topologies by number of chips


CHIPS = {
    "v6e": Chip(
        918e12,
        1.75e9,
        180e9,
        1640e9,
        31.25,
        {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"},
    ),
    "v5p": Chip(459e12, 1.75e9, 180e9, 2765e9, 95.0, {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"}),
}


def mesh_of(dp: int, tp: int, kind: str = "v6e") -> Mesh:
    """A mesh of chips that are not there."""
    name = f"{kind}:{CHIPS[kind].slices[dp * tp]}"
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return Mesh(np.array(chips).reshape(dp, tp), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)


def config_of(recipe: str, experts: str | None) -> target.TargetConfig:
    """The target's description, without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        storage.write_json(f"{folder}/config.json", PUBLISHED[recipe])
        return target.read_config(folder, experts)


def compile_dump(
    recipe: str, length: int, **changed: Any
) -> tuple[jax.stages.Compiled, target.TargetConfig, int]:
    """(the dump's program for one batch of a recipe, its target, the batch's rows); `changed` fields of
    [dump] win over the recipe's."""
    known = recipes.load(recipe)
    config = DumpConfig("model", "store", **known.dump | changed)
    kind = known.dump_slice.split("-")[0]
    cfg, mesh = config_of(recipe, config.experts), mesh_of(config.dp, config.tp, kind)
    aux, codec = target.default_aux_layers(cfg.num_layers), Codec(config.logits, 0, config.precision)
    rows = config.batch(length, min(CHIPS_A_HOST, mesh.size))
    weights = shapes(target.parameters(cfg, config.tp, config.dp), jnp.bfloat16, mesh)
    return Program(cfg, mesh, aux, codec, None, rows, length).compile(weights), cfg, rows


def priced(done: Work, cfg: target.TargetConfig, tokens: float, length: int, chip: Chip) -> dict[str, float]:
    """Seconds of a batch of which one chip computes `tokens`, and the share of the peak."""
    kernels = 0.0
    if done.kernels:  # attention's, of which blocks on the diagonal are computed whole, and the experts'
        kernels = tokens * (attention_flops(cfg, length) * (1 + BLOCK / length) + expert_flops(cfg))
    chunks = sum(la.attention.key_heads for la in cfg.layers if isinstance(la.attention, DeltaNet)) / CHUNK
    found = {
        "compute_s": done.cycles / chip.cycles,
        "kernels_s": kernels / (KERNELS * chip.flops) + tokens * chunks * deltakernel.CYCLES / chip.cycles,
        "waits_s": done.waited / chip.wire,
        "beside_s": sum(sent for _, sent in done.beside) / chip.wire,
        "gathers_s": 2 * done.unpriced / chip.hbm,  # read and written
        "needed_s": needed_flops(cfg, length) * tokens / chip.flops,
    }
    alone = found["compute_s"] + found["kernels_s"] + found["waits_s"]
    return found | {"peak_fraction": found["needed_s"] / max(alone, found["beside_s"])}


def expected(recipe: str, length: int = 2048) -> dict[str, float]:
    """What the compiler expects of a recipe's batch: `priced`, and GiB of a chip."""
    compiled, cfg, rows = compile_dump(recipe, length)
    slice_name = recipes.load(recipe).dump_slice
    chip, chips = CHIPS[slice_name.split("-")[0]], recipes.chips(slice_name)
    found = priced(work(compiled.as_text()), cfg, rows * length / chips, length, chip)
    held = compiled.memory_analysis()
    size = held.argument_size_in_bytes + held.temp_size_in_bytes + held.output_size_in_bytes
    return found | {"rows": rows, "gib": size / 2**30, "gib_there": chip.hbm_gib}


def figures() -> dict[str, dict[str, Any]]:
    """dump.tpu_peak_fraction.NAME of the recipes that have a bar; without a value, and why, where the TPU
    compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        missing = {"value": None, "unit": "share", "why": f"no TPU compiler here: {install('tpu')}"}
        return {f"dump.tpu_peak_fraction.{name}": missing for name in BARS}
    return {f"dump.tpu_peak_fraction.{name}": _figure(name) for name in BARS}


def _figure(name: str) -> dict[str, Any]:
    slice_name = recipes.load(name).dump_slice
    note(f"bench: compiling the dump of {name} for {slice_name}")
    found = alone(["pipelines.bench.tpu", name], recipes.chips(slice_name))
    return {
        "value": found["peak_fraction"],
        "unit": "share",
        "at_least": BARS[name],
        "compared_with": f"the peak of a {slice_name}; per batch of {found['rows']:.0f} x 2,048 tokens "
        f"{found['needed_s'] * 1e3:.0f} ms needed, {found['compute_s'] * 1e3:.0f} ms expected, "
        f"{found['kernels_s'] * 1e3:.0f} ms of kernels at {KERNELS} of the peak, "
        f"{found['waits_s'] * 1e3:.0f} ms of waiting for collectives, and not counted "
        f"{found['gathers_s'] * 1e3:.0f} ms of gathered rows at HBM's rate; {found['gib']:.1f} of "
        f"{found['gib_there']:.1f} GiB a chip",
    }


def alone(module: list[str], chips: int = 16) -> dict[str, float]:
    """What a Python module prints as JSON, in a process of its own that looks for no TPU."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    env |= {"TPU_ACCELERATOR_TYPE": f"v6e-{chips}"}
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(module)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(expected(sys.argv[1])))
