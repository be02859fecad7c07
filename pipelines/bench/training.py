"""Figures of a training step: how near to the machine's matmul rate, and beside a plain implementation.

The size at which the public PyTorch trainers were measured: H=512, draft vocabulary 8,000, 4 x 512 tokens,
K=7, float32, every position counted. Dimensions as in train/batch.py.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import attention
from common.mesh import make_mesh, sharding
from common.params import initialise
from common.progress import note
from pipelines.bench import plain
from pipelines.bench.matmuls import Matmul, matmuls
from pipelines.bench.timing import matmul_rate, times
from train import optimizer
from train.batch import Batch, Frozen
from train.heads.eagle3.head import Eagle3
from train.loss import chunk_size
from train.step import State, gradient, train_step
from train.targets import (
    compact,
    counted_targets,
    live_capacity,
    live_places,
    live_queries,
    round_up,
)

DECAY, REPEATS = 0.8, 3


@dataclass(frozen=True)
class Size:
    """A training step's shapes."""

    rows: int = 4
    length: int = 512
    steps: int = 7
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 8
    ffn: int = 1408
    draft: int = 8_000
    vocabulary: int = 32_000

    @property
    def head(self) -> Eagle3:
        return Eagle3(
            hidden_size=self.hidden,
            target_hidden_size=self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            ffn=self.ffn,
            draft_vocab_size=self.draft,
            vocab_size=self.vocabulary,
            rms_eps=1e-5,
            rope_theta=10_000.0,
            rope=None,
            max_position=self.length,
            aux_layers=(2, 4, 6),
            num_target_layers=9,
        )


@dataclass(frozen=True)
class Problem:
    """One batch of random features; `mask_BT` marks its targets, `flops` is what it needs at least."""

    size: Size
    params: dict[str, jax.Array]
    frozen: Frozen
    batch: Batch
    mask_BT: np.ndarray
    weight_K: np.ndarray
    flops: float


def make_problem(size: Size, seed: int = 0) -> Problem:
    """Rows of one document each, all of it counted."""
    rng = np.random.default_rng(seed)
    B, T, H, K = size.rows, size.length, size.hidden, size.steps
    segments, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    counted = counted_targets(segments, np.ones((B, T), np.uint8))
    live = live_queries(segments, counted, K)
    ids = np.sort(rng.permutation(size.vocabulary)[: size.draft])
    index = np.full(size.vocabulary, -1, np.int32)
    index[ids] = np.arange(size.draft)
    embed = (0.1 * rng.normal(size=(size.vocabulary, H))).astype(np.float32)
    lm_head = (0.1 * rng.normal(size=(size.draft, H))).astype(np.float32)
    last = rng.normal(size=(B, T, H)).astype(np.float32)
    teacher = last.reshape(-1, H) @ lm_head.T
    batch = Batch(
        tokens=rng.integers(size.vocabulary, size=(B, T)).astype(np.int32),
        segment_ids=segments,
        positions=positions,
        aux_hidden=rng.normal(size=(B, T, 3, H)).astype(np.float32),
        last_hidden=last,
        draft_logprobs=None,
        argmax=ids[teacher.argmax(-1)].reshape(B, T).astype(np.int32),
        logsumexp=np.log(np.exp(teacher).sum(-1)).reshape(B, T).astype(np.float32),
        live=live_places(live, 1, live_capacity(int(live.sum()), B * T)),
        targets=compact(counted, 1, round_up(int(counted.sum()))),
        count=np.array([counted.sum()], np.int32),
    )
    by_step = np.array([counted[:, 1 + step :].sum() for step in range(K)])
    params = initialise(size.head.parameters(), jax.random.key(seed))
    frozen = Frozen(embed, lm_head, index)
    flops = least_flops(
        size.head, B * T, int(live.sum()), int(counted.sum()), int(by_step.sum()), B * T * (T + 1) / 2, K
    )
    return Problem(size, params, frozen, batch, counted, DECAY ** np.arange(K) / by_step, flops)


def least_flops(c: Eagle3, n: int, live: int, targets: int, predictions: int, pairs: int, K: int) -> float:
    """Multiply-adds, twice, of forward and backward once: nothing recomputed, nothing that does not count.

    n: positions; live: indices that predict; targets: positions with a teacher; predictions: (target, step)
    pairs; pairs: (query, visible key of step 0). A trained matmul costs three of its forward; the teacher's
    costs one, and `fc` two, for no gradient goes to the features.
    """
    H, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    once = targets * H * c.draft_vocab_size
    twice = n * len(c.aux_layers) * H * H
    step = live * (q * H + 3 * c.ffn * H) + 2 * pairs * q  # o_proj, MLP, attention
    own = live * H * (q + 2 * kv)
    thrice = n * H * (q + 2 * kv) + n * H * 2 * kv + live * H * q + (K - 1) * own + K * step
    thrice += predictions * H * c.draft_vocab_size
    return 2.0 * (once + 2 * twice + 3 * thrice)


def _temporaries(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def matmul_flops(problem: Problem, compiled: Any) -> float:
    """FLOPs of the matmuls of a compiled step. Two kinds of loops have a length that the program does not
    know: over the blocks of keys that a block of queries sees, and over the targets that there are."""
    blocks = -(-problem.size.length // attention.BLOCK)
    targets = len(problem.batch.targets)
    chunks = targets / chunk_size(targets, problem.size.steps * problem.size.draft, jnp.float32)

    def runs(found: Matmul) -> float:
        if not found.unknown:
            return 1.0
        return (blocks + 1) / 2 if re.search(r"/j\w*,\w*->j\w*/", found.name) else chunks

    return sum(found.flops * runs(found) for found in matmuls(compiled.as_text()))


def compile_steps(problem: Problem) -> tuple[tuple[Any, tuple, float], tuple[Any, tuple, float]]:
    """(compiled step, its arguments, CPU seconds of tracing and compiling) of Eyas and of the plain
    implementation; both end in AdamW."""
    mesh, c, K = make_mesh(), problem.size.head, problem.size.steps
    adamw = optimizer.make(optimizer.schedule(1e-4, 0.02, 100), 0.5, (0.9, 0.999), 0.0)

    def compiled(gradients: Callable, place: Callable) -> tuple[Any, tuple, float]:
        state = State(problem.params, adamw.init(problem.params), jnp.int32(0))
        arguments = place(state, ()), place(problem.frozen, ()), place(problem.batch, ("row",))
        start = time.process_time()
        step = jax.jit(train_step(gradients, adamw)).lower(*arguments).compile()
        return step, arguments, time.process_time() - start

    def on_mesh(tree: Any, axes: tuple) -> Any:
        return jax.tree.map(
            lambda x: jax.device_put(x, sharding(mesh, (axes + (None,) * x.ndim)[: x.ndim])), tree
        )

    def plain_gradients(params: Any, frozen: Frozen, batch: Batch) -> Any:
        mask, weight_K = jnp.asarray(problem.mask_BT), jnp.asarray(problem.weight_K, jnp.float32)
        found, gradients = jax.value_and_grad(plain.loss, 1)(c, params, frozen, batch, mask, weight_K)
        return (found, jnp.zeros(K), jnp.zeros(K)), gradients

    note("bench: compiling a training step")
    ours = compiled(gradient(c, mesh, K, DECAY, jnp.float32), on_mesh)
    note("bench: compiling the plain implementation")
    return ours, compiled(plain_gradients, lambda tree, axes: jax.tree.map(jnp.asarray, tree))


def figures(size: Size | None = None) -> dict[str, dict[str, Any]]:
    """train.peak_fraction, train.speedup, train.loss_difference, train.peak_bytes_ratio, train.flops_ratio
    and train.compile_s."""
    problem = make_problem(size or Size())
    (ours, arguments, ours_compiled_s), (theirs, plain_arguments, plain_compiled_s) = compile_steps(problem)
    rate = matmul_rate()
    ours_s = min(times(lambda: ours(*arguments), REPEATS))
    theirs_s = min(times(lambda: theirs(*plain_arguments), 2))
    rate = max(rate, matmul_rate())
    losses = float(ours(*arguments)[1].loss), float(theirs(*plain_arguments)[1].loss)
    return {
        "train.peak_fraction": {
            "value": problem.flops / ours_s / rate,
            "unit": "share",
            "at_least": 0.75,
            "compared_with": f"a float32 matmul of 2,048 cubed: {rate / 1e9:.0f} GFLOP/s; the step needs "
            f"{problem.flops / 1e9:.0f} GFLOP and takes {ours_s:.2f} s",
        },
        "train.speedup": {
            "value": theirs_s / ours_s,
            "unit": "times",
            "compared_with": f"a plain, unchunked implementation of the same loss: {theirs_s:.2f} s",
        },
        "train.loss_difference": {
            "value": abs(losses[0] - losses[1]) / losses[1],
            "unit": "share",
            "at_most": 1e-4,
            "compared_with": f"the plain implementation's loss, {losses[1]:.4f}",
        },
        "train.peak_bytes_ratio": {
            "value": _temporaries(ours) / _temporaries(theirs),
            "unit": "share",
            "at_most": 0.2,
            "compared_with": f"the plain implementation's temporaries, {_temporaries(theirs) / 1e9:.2f} GB",
        },
        "train.flops_ratio": {
            "value": matmul_flops(problem, ours) / problem.flops,
            "unit": "share",
            "at_most": 1.35,
            "compared_with": f"the {problem.flops / 1e9:.0f} GFLOP that the step needs",
        },
        "train.compile_s": {
            "value": ours_compiled_s,
            "unit": "CPU s",
            "compared_with": f"the plain implementation's {plain_compiled_s:.1f} s, whose steps are unrolled",
        },
    }
