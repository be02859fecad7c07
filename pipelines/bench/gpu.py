"""How near dump and training come to the peak of an NVIDIA GPU, measured on the one that is there.

    python -m pipelines.bench.gpu    prints the figures as JSON

Programs and sizes are those of the recipes; weights and states are random, all positions count.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.codec import Codec
from common.mesh import make_mesh, sharding
from common.params import shapes
from common.progress import note
from dump import target
from dump.config import DumpConfig
from dump.prefill import Program
from dump.target.flops import needed_flops
from pipelines import recipes
from pipelines.bench.timing import matmul_rate, times
from pipelines.bench.tpu import config_of
from pipelines.bench.tpu_training import compile_step
from pipelines.bench.training import least_flops
from train.batch import Batch, Frozen
from train.step import State

# dense bfloat16 FLOPs a second, of NVIDIA's data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
DUMPED, TRAINED = "llama-3.1-8b", "qwen3-8b"
LENGTH, ROWS = 2048, 4
_REPEATS = 5


def figures() -> dict[str, dict[str, Any]]:
    """dump.gpu_mfu and train.gpu_mfu; without a value, and why, where there is no GPU whose peak is known."""
    names, chip = ("dump.gpu_mfu", "train.gpu_mfu"), jax.devices()[0]
    peak = next((flops for name, flops in PEAKS.items() if name in chip.device_kind), None)
    if chip.platform != "gpu" or peak is None:
        why = f"no GPU of a known peak here ({', '.join(PEAKS)}): found {chip.device_kind}"
        return {name: {"value": None, "unit": "share", "why": why} for name in names}
    rate = matmul_rate(8192, dtype=jnp.bfloat16)
    known = f"the {peak / 1e12:.0f} TFLOP/s of an {chip.device_kind}, where a large bfloat16 matmul reaches "
    known += f"{rate / 1e12:.0f}"
    return {
        "dump.gpu_mfu": _figure(*dump_rate(DUMPED), peak, 0.50, f"{known}; {DUMPED}'s forward pass"),
        "train.gpu_mfu": _figure(
            *training_rate(TRAINED), peak, 0.40, f"{known}; a step of {TRAINED}'s head of {ROWS} rows"
        ),
    }


def _figure(flops: float, seconds: float, peak: float, bar: float, known: str) -> dict[str, Any]:
    beside = f"{known}, rows of {LENGTH:,} tokens: {seconds * 1e3:.0f} ms"
    return {"value": flops / seconds / peak, "unit": "share", "at_least": bar, "compared_with": beside}


def dump_rate(recipe: str) -> tuple[float, float]:
    """(FLOPs that a batch of the recipe's dump needs, seconds that it takes) on one GPU."""
    note(f"bench: compiling the dump of {recipe} for this GPU")
    config = DumpConfig("model", "store", **recipes.load(recipe).dump | {"dp": 1, "tp": 1})
    cfg, mesh, rows = config_of(recipe, config.experts), make_mesh(), config.batch(LENGTH, 1)
    weights = _made(shapes(target.parameters(cfg), jnp.bfloat16, mesh))
    aux, codec = target.default_aux_layers(cfg.num_layers), Codec(config.logits, 0, "bfloat16")
    program = Program(cfg, mesh, aux, codec, None, rows, LENGTH).compile(weights)
    where, whole = sharding(mesh, ("row", None)), (rows, LENGTH)
    tokens = np.random.default_rng(0).integers(cfg.vocab_size, size=whole).astype(np.int32)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
    batch = [jax.device_put(x, where) for x in (tokens, np.ones(whole, np.int32), places)]
    seconds = min(times(lambda: program(weights, {}, *batch), _REPEATS))
    return needed_flops(cfg, LENGTH) * rows * LENGTH, seconds


def training_rate(recipe: str) -> tuple[float, float]:
    """(FLOPs that a training step of the recipe's head needs, seconds that it takes) on one GPU."""
    note(f"bench: compiling a training step of {recipe}'s head for this GPU")
    mesh = make_mesh()
    step, (state, frozen, batch), head, config = compile_step(recipe, LENGTH, ROWS, mesh)
    state, frozen, batch = _made(state), _made(frozen), _all_counted(_made(batch), head.vocab_size)

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        return metrics

    seconds = min(times(run, _REPEATS))
    n, K = ROWS * LENGTH, config.ttt_steps
    return least_flops(head, n, n, n, K * n, n * (LENGTH + 1) / 2, K), seconds


def _made(tree: State | Frozen | Batch | dict[str, Any]) -> Any:
    """Arrays of these shapes where they are to lie: small random reals, and integers that are zero."""
    leaves, form = jax.tree.flatten(tree)

    def fill(number: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        make = jax.jit(
            lambda key: (0.02 * jax.random.normal(key, x.shape, jnp.bfloat16)).astype(x.dtype),
            out_shardings=x.sharding,
        )
        return make(jax.random.key(number))

    return form.unflatten(fill(number, x) for number, x in enumerate(leaves))


def _all_counted(batch: Batch, vocabulary: int) -> Batch:
    """The batch with random tokens, one document a row, of which every position is a target."""
    rng, (B, T) = np.random.default_rng(0), batch.tokens.shape
    every = np.arange(B * T, dtype=np.int32)
    told = {
        "tokens": rng.integers(vocabulary, size=(B, T)),
        "argmax": rng.integers(vocabulary, size=(B, T)),
        "segment_ids": np.ones((B, T)),
        "positions": np.tile(np.arange(T), (B, 1)),
        "live": every,
        "targets": every,
        "count": np.full(len(batch.count), B * T // len(batch.count)),
        "row": np.arange(B),
    }
    return batch._replace(
        **{
            name: jax.device_put(value.astype(np.int32), getattr(batch, name).sharding)
            for name, value in told.items()
        }
    )


if __name__ == "__main__":
    print(json.dumps(figures()))
