"""How near training comes to a TPU's peak, by the TPU compiler's own estimates: no TPU is needed.

    python -m pipelines.bench.tpu_training RECIPE LENGTH ROWS [SP] [OPTIMIZER]    prints what it expects of a
                                                                                step, as JSON

ROWS are those of a chip, or of each SP chips that share them, each one document, all of it counted. OPTIMIZER
in the place of the recipe's. Priced as
pipelines/bench/tpu.py says, but the attention kernels one by one: forwards they multiply twice, backwards
seven times, and what they are given.
"""

import importlib.util
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.compiling import training_options
from common.mesh import sharding, ways
from common.params import shapes
from common.progress import note
from common.splash import BLOCK
from common.texts import install
from dump import target
from pipelines import recipes
from pipelines.bench.hlo import work
from pipelines.bench.tpu import CHIPS, KERNELS, alone, config_of, mesh_of
from pipelines.bench.training import least_flops
from train import optimizer, pieces, placing
from train.batch import Batch, Frozen
from train.config import TrainConfig
from train.heads.eagle3.head import Eagle3
from train.loss import chunk_size
from train.step import State, gradient, train_step
from train.targets import round_up

BARS = {"qwen3-32b": 0.45, "llama-3.1-8b": 0.40}
LENGTHS = {"qwen3-32b": (2048, 4096), "llama-3.1-8b": (2048,)}
POSITIONS = 8192  # of a chip: four rows of 2,048
_STEPS = 1000  # of the schedule, which costs nothing


def compile_step(
    recipe: str, length: int, rows: int, mesh: Mesh | None = None, sp: int = 1, rule: str | None = None
) -> tuple[jax.stages.Compiled, tuple[State, Frozen, Batch], Eagle3, TrainConfig]:
    """(one training step of `rows` rows of a chip, or of `sp` chips, the shapes of its arguments, the head,
    the recipe's configuration); on the recipe's slice if no mesh is given. `rule`: another optimiser."""
    known = recipes.load(recipe)
    config = TrainConfig("store", "out", **known.train | ({"optimizer": rule} if rule else {}))
    aux = target.default_aux_layers(known.layers)
    head = Eagle3.for_target(config_of(recipe, None).text, config.draft_vocab, aux, ffn=config.ffn)
    mesh = mesh or mesh_of(config.dp * config.sp // sp, sp, known.train_slice.split("-")[0])
    rate = optimizer.schedule(config.learning_rate, config.warmup, _STEPS)
    units = np.ones(len(aux) * head.hidden_size, np.float32)
    muon = head.matrices() if config.optimizer == "muon" else frozenset()
    how = rate, config.clip, config.betas, config.weight_decay, {"fc.weight": units}
    made = optimizer.make(*how, muon=muon)
    params = shapes(head.parameters(), jnp.float32)
    state = State(params, jax.eval_shape(made.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    step = train_step(gradient(head, mesh, config.ttt_steps, config.decay, jnp.bfloat16), made)
    frozen = _frozen(head)
    lying = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        (state, frozen),
        (placing.along(state, head.parameters(), mesh), _frozen_lies(frozen, mesh)),
    )
    given = *lying, _batch(head, mesh, length, rows, config.ttt_steps)
    compiled = jax.jit(step, donate_argnums=0).lower(*given).compile(training_options(mesh))
    return compiled, given, head, config


def _frozen(c: Eagle3) -> Frozen:
    embed, lm_head = (
        jax.ShapeDtypeStruct((n, c.hidden_size), jnp.bfloat16) for n in (c.vocab_size, c.draft_vocab_size)
    )
    return Frozen(embed, lm_head, jax.ShapeDtypeStruct((c.vocab_size,), jnp.int32))


def _frozen_lies(frozen: Frozen, mesh: Mesh) -> Frozen:
    return Frozen(*(sharding(mesh, axes) for axes in placing.frozen_axes(frozen, mesh)))


def _batch(c: Eagle3, mesh: Mesh, T: int, rows_of_chip: int, steps: int) -> Batch:
    """One batch, whose positions all count."""
    B, sp = rows_of_chip * ways(mesh, "batch"), ways(mesh, "position")
    own = T // sp
    ahead, behind = (steps, pieces.halo(own, steps)) if sp > 1 else (0, 0)

    def rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        where = sharding(mesh, ("batch", "position", None, None)[: len(shape)])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def by_chip(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size * size,), jnp.int32, sharding=sharding(mesh, ("chip",)))

    return Batch(
        **dict.fromkeys(("tokens", "segment_ids", "positions", "argmax"), rows(B, T)),
        draft_logprobs=None,
        live=by_chip(rows_of_chip * (own + behind)),
        targets=by_chip(round_up(rows_of_chip * (own + ahead))),
        row=rows(B),
        aux_hidden=rows(B, T, len(c.aux_layers), c.hidden_size, dtype=jnp.bfloat16),
        last_hidden=rows(B, T, c.hidden_size, dtype=jnp.bfloat16),
        logsumexp=rows(B, T, dtype=jnp.float32),
        count=by_chip(1),
    )


def expected(
    recipe: str, length: int = 2048, rows: int = 4, sp: int = 1, rule: str | None = None
) -> dict[str, float]:
    """What the compiler expects of a recipe's step: seconds, the share of the peak, and GiB of a chip."""
    compiled, (*_, batch), head, config = compile_step(recipe, length, rows, sp=sp, rule=rule)
    chip, K, n = CHIPS[recipes.load(recipe).train_slice.split("-")[0]], config.ttt_steps, rows * length // sp
    room = len(batch.targets) // len(batch.count)
    chunk = chunk_size(room, K * head.draft_vocab_size, jnp.bfloat16)
    # the loss's loop is the only one without a length
    done = work(compiled.as_text(), trips=-(-(n if sp == 1 else n + K * rows) // chunk))
    pairs = n * (length + BLOCK) / 2  # blocks on the diagonal are computed whole
    attention = 2.0 * K * pairs * head.num_heads * head.head_dim * (2 + 7)
    needed = least_flops(head, n, n, n, K * n, n * (length + 1) / 2, K) / chip.flops
    found = {
        "compute_s": done.cycles / chip.cycles,
        "kernels_s": attention / (KERNELS * chip.flops),
        "waits_s": done.waited / chip.wire,
        "beside_s": sum(sent for _, sent in done.beside) / chip.wire,
        "needed_s": needed,
    }
    alone = found["compute_s"] + found["kernels_s"] + found["waits_s"]
    held = compiled.memory_analysis()
    size = held.argument_size_in_bytes + held.temp_size_in_bytes
    return found | {
        "peak_fraction": needed / max(alone, found["beside_s"]),
        "gib": size / 2**30,
        "gib_there": chip.hbm_gib,
        "rows": rows,
    }


def figures() -> dict[str, dict[str, Any]]:
    """train.tpu_peak_fraction.NAME; without a value, and why, where the TPU compiler is not installed."""
    names = [(recipe, length) for recipe, lengths in LENGTHS.items() for length in lengths]
    if importlib.util.find_spec("libtpu") is None:
        missing = {"value": None, "unit": "share", "why": f"no TPU compiler here: {install('tpu')}"}
        return {_name(*one): missing for one in names}
    return {_name(*one): _figure(*one) for one in names}


def _name(recipe: str, length: int) -> str:
    return f"train.tpu_peak_fraction.{recipe}" + ("" if length == 2048 else f".{length}")


def _figure(recipe: str, length: int) -> dict[str, Any]:
    slice_name = recipes.load(recipe).train_slice
    note(f"bench: compiling a training step of {recipe}'s head for {slice_name}")
    asked = [recipe, str(length), str(POSITIONS // length)]
    found = alone(["pipelines.bench.tpu_training", *asked], recipes.chips(slice_name))
    return {
        "value": found["peak_fraction"],
        "unit": "share",
        "at_least": BARS[recipe],
        "compared_with": f"the peak of a {slice_name}; {found['rows']:.0f} rows of {length:,} a chip: "
        f"{found['needed_s'] * 1e3:.0f} ms needed, {found['compute_s'] * 1e3:.0f} ms expected, "
        f"{found['kernels_s'] * 1e3:.0f} ms of attention at {KERNELS} of the peak, "
        f"{found['waits_s'] * 1e3:.0f} ms of waiting for collectives; {found['gib']:.1f} of "
        f"{found['gib_there']:.1f} GiB a chip",
    }


if __name__ == "__main__":
    print(json.dumps(expected(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])))
