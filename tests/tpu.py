"""Compiles programs for TPU chips that are not there; prints FLOPs and bytes of one chip, as JSON.

moe RECIPE SPLIT DP TP      a target's first layer of experts, as many tokens a v6e chip as in its recipe
layer RECIPE                a target's first layer, a batch as in its recipe
prefill RECIPE LENGTH       a batch of the dump in rows of that length, as its recipe lays it out
train RECIPE [LENGTH [SP]]  a training step, all counted, as the recipe lays it out; SP pieces a row
fit RECIPE                  the system of a head's fitted start
delta RECIPE                instructions of DeltaNet's kernel for a chunk of a key head
"""

import glob
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding

from common.compiling import compiler_options
from common.mesh import sharding, spec
from common.params import shapes
from dump import target
from dump.config import DumpConfig
from dump.target import deltakernel
from dump.target import moe as module
from dump.target.deltanet import DeltaNet
from dump.target.flops import attention_flops, needed_flops
from dump.target.moe import Moe
from dump.target.spec import Context
from pipelines import recipes
from pipelines.bench.tpu import CHIPS_A_HOST, compile_dump, config_of, mesh_of
from pipelines.bench.tpu_training import compile_step
from train import sample
from train.config import TrainConfig

LENGTH = 2048


def moe(recipe: str, split: str, dp: int, tp: int) -> dict[str, float]:
    """FLOPs of the experts: loops over parts of the tokens and over blocks of rows counted out, and tiles of
    the kernel that lie across the rows of two experts counted twice, as they are computed."""
    layer = next(la for la in config_of(recipe, None).layers if isinstance(la.feed_forward, Moe))
    part = replace(layer.feed_forward, split=split)
    mesh, H = mesh_of(dp, tp), part.router.hidden
    held, specs = {}, {}
    for name, w in part.weights(tp).items():
        turn = slice(None, None, -1 if w.transposed else 1)
        lead = ((w.experts,), (w.expert_axis,)) if w.experts else ((), ())
        specs[name] = spec(lead[1] + w.axes[turn])
        place = NamedSharding(mesh, specs[name])
        held[name] = jax.ShapeDtypeStruct(lead[0] + w.shape[turn], w.dtype or jnp.bfloat16, sharding=place)
    rows = spec(("batch", None, None))

    def run(w, x_BTH):
        empty = jnp.zeros(x_BTH.shape[:2], jnp.int32)
        return part(w, x_BTH, Context(empty, empty, tp))

    rows_of_chip = recipes.load(recipe).dump["chip_tokens"] // LENGTH
    x = jax.ShapeDtypeStruct(
        (dp * tp * rows_of_chip, LENGTH, H), jnp.bfloat16, sharding=NamedSharding(mesh, rows)
    )
    step = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False))
    compiled = step.lower(held, x).compile()
    return loops_counted(part, tp * rows_of_chip * LENGTH, tp, compiled.cost_analysis()["flops"]) | memory(
        compiled
    )


def loops_counted(part: Moe, tokens: int, tp: int, counted: float) -> dict[str, float]:
    """`counted` with every loop's body as often as it runs when every expert gets as many tokens."""
    H, k, F = part.router.hidden, part.router.top_k, part.experts.ffn
    shared = part.shared.ffn if part.shared else 0
    active = 2 * tokens * (k * 3 * H * F + 3 * H * shared) / tp
    parts = -(-tokens * k * H // module.SORTED_VALUES)
    rows, runs = -(-tokens // parts) * k, parts
    body = rows
    if part.split == "expert":
        body = max(module.LEAST_ROWS, -(-rows // (tp * module.BLOCKS)))
        runs = parts * -(-rows // (tp * body))
    width = F if part.split == "expert" else F / tp
    held = part.router.experts // (tp if part.split == "expert" else 1)
    more = (runs - 1) * body + parts * held * module.tile_rows(body, held)
    return {"flops": counted + more * 2 * 3 * H * width, "active": active, "counted": counted}


def layer(recipe: str) -> dict[str, float]:
    """FLOPs of the first layer, against the least that its matrices need."""
    known = recipes.load(recipe)
    config, whole = DumpConfig("model", "store", **known.dump), config_of(recipe, None)
    cfg = replace(whole, layers=whole.layers[:1])
    mesh = mesh_of(config.dp, config.tp, known.dump_slice.split("-")[0])
    rows = config.batch(LENGTH, min(CHIPS_A_HOST, mesh.size))
    weights = shapes(target.parameters(cfg, config.tp, config.dp), jnp.bfloat16, mesh)
    batch = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=sharding(mesh, ("row", None)))
    step = jax.jit(lambda weights, *batch: target.forward(cfg, weights, *batch, (0,)))
    compiled = step.lower(weights, batch, batch, batch).compile(compiler_options=compiler_options(mesh))
    a_token = needed_flops(cfg, LENGTH) - attention_flops(cfg, LENGTH) - 2 * cfg.vocab_size * cfg.hidden_size
    least = rows // mesh.size * LENGTH * a_token
    return {"flops": compiled.cost_analysis()["flops"], "least": least} | memory(compiled)


def prefill(recipe: str, length: int) -> dict[str, float]:
    """Memory of a chip for one batch of the dump, codec included."""
    compiled, _, rows = compile_dump(recipe, length)
    return memory(compiled) | {"rows": rows}


def train(recipe: str, length: int = LENGTH, sp: int = 1) -> dict[str, float]:
    """Memory of a chip for one training step, of one row if rows lie in pieces."""
    config = TrainConfig("store", "out", **recipes.load(recipe).train)
    rows = 1 if sp > 1 else max(1, config.batch_rows // config.dp * LENGTH // length)
    compiled, _, head, _ = compile_step(recipe, length, rows, sp=sp)
    return memory(compiled) | {"parameters": sum(math.prod(p.shape) for p in head.parameters().values())}


def fit(recipe: str) -> dict[str, float]:
    """Memory of a chip for solving the system that the fitted start is."""
    known = recipes.load(recipe)
    H, A = known.hidden_size, len(target.default_aux_layers(known.layers)) * known.hidden_size
    everywhere = spec(())

    def sums(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(mesh, ()))

    mesh = mesh_of(recipes.chips(known.train_slice), 1, known.train_slice.split("-")[0])
    total = sample._Moments(sums(), sums(A), sums(), sums(A + H, A + H), sums(A + H, H), sums(H))
    solved = jax.shard_map(
        sample._solved, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere, check_vma=False
    )
    return memory(jax.jit(solved).lower(total, sums()).compile())


def delta(recipe: str) -> dict[str, float]:
    """Instructions that the kernel's loop is compiled to: a cycle each, where nothing waits for memory."""
    part = next(la.attention for la in config_of(recipe, None).layers if isinstance(la.attention, DeltaNet))
    K, G, D, T = part.key_heads, part.value_heads // part.key_heads, part.key_dim, deltakernel.ROWS
    with tempfile.TemporaryDirectory() as folder:
        # Read when the first mesh is made.
        wanted = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} {wanted}"
        place = SingleDeviceSharding(mesh_of(4, 1).devices.flat[0])
        sizes = (
            (1, T, K * (2 + 2 * G) * D),
            (1, T, K, 2 * G),
            (K, G),
            (K, G),
            (part.kernel, K, (2 + G) * D),
            (D,),
            (1, T),
        )
        kinds = jnp.bfloat16, jnp.bfloat16, *(jnp.float32,) * 4, jnp.int32
        given = [
            jax.ShapeDtypeStruct(size, kind, sharding=place) for size, kind in zip(sizes, kinds, strict=True)
        ]
        options = compiler_options(mesh_of(4, 1))
        jax.jit(partial(deltakernel.mix, 1e-6, 1e-6)).lower(*given).compile(compiler_options=options)
        (listed,) = glob.glob(f"{folder}/*delta_net*-final_bundles.txt")
        with open(listed) as lines:  # `>>` stands in front of what lies in the loop inside of a block's
            found = sum(bool(re.match(r" *0x[0-9a-f]+ *: >>", line)) for line in lines)
    return {"cycles": found / math.gcd(K, deltakernel.HEADS)}


def memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB of a chip."""
    found = compiled.memory_analysis()
    return {
        "arguments_gib": round(found.argument_size_in_bytes / 2**30, 2),
        "temporaries_gib": round(found.temp_size_in_bytes / 2**30, 2),
        "outputs_gib": round(found.output_size_in_bytes / 2**30, 2),
    }


if __name__ == "__main__":
    verb, recipe, *rest = sys.argv[1:]
    run = {"moe": moe, "layer": layer, "prefill": prefill, "train": train, "fit": fit, "delta": delta}[verb]
    print(json.dumps(run(recipe, *(int(value) if value.isdigit() else value for value in rest))))
