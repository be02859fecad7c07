"""Figures of training on real chats: tokens a second beside the plain implementation, and what a run of
usual length spends on evaluations and checkpoints."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.progress import note
from pipelines.bench import plain
from pipelines.bench.training import DECAY
from train.batch import Batch, Frozen, Params
from train.config import TrainConfig
from train.evaluate import score_all
from train.experiment import claimed
from train.pace import Saving
from train.plan import Plan
from train.planning import make_plan
from train.step import State, train_step
from train.stream import Stream
from train.trainer import Trainer

_STEPS = 1000  # of the run whose pace is told
_TIMED = 6  # steps that are timed
_DRAFT = 8192  # draft vocabulary


def figures(store: str, place: str) -> dict[str, dict[str, Any]]:
    """train.tokens_per_s and train.pace_share, of a dumped store with held-out rows."""
    note(f"bench: {1 + _TIMED} of {_STEPS} steps on real chats")
    plan = make_plan(
        TrainConfig(
            store=store,
            out=f"{place}/chats",
            steps=_STEPS,
            draft_vocab=_DRAFT,
            batch_rows=2,
            optimizer="adamw",  # as the steps of pipelines/bench/training.py
        )
    )
    with claimed(plan), Trainer(plan) as trainer:
        batches = [batch for dealt in _some(plan) for _, batch in dealt]
        trainer.compile(batches[0])
        trainer.take(batches[0])
        trainer.finish()
        step = _seconds(lambda: _train(trainer, batches[1:])) / _TIMED
        plainly = _plain_step(plan, trainer, batches)
        costs = _Costs(trainer)
    tokens, total = batches[0].tokens.size, costs.of(plan, step)
    return {
        "train.tokens_per_s": {
            "value": tokens / step,
            "unit": "tokens/s",
            "compared_with": "a plain, unchunked implementation on the same batches: "
            f"{tokens / plainly:.0f}; "
            f"{int(batches[0].count.sum())} of {tokens} positions are targets",
        },
        "train.pace_share": {
            "value": total / (total + _STEPS * step),
            "unit": "share",
            "at_most": 0.05,
            "compared_with": f"all of a run of {_STEPS} steps of {step:.2f} s, by what each costs here: "
            f"{costs}, as often as the run's own plan says and as if no step were done meanwhile",
        },
    }


class _Costs:
    """Seconds of compiling an evaluation, of an evaluation, of the export of a head, and of a checkpoint."""

    def __init__(self, trainer: Trainer):
        def evaluate() -> Any:
            return score_all([trainer.measured], "evaluate")[0]

        first = _seconds(evaluate)
        self.evaluation = _seconds(evaluate)
        self.compiling = max(0.0, first - self.evaluation)
        metrics = evaluate()
        self.export = _seconds(lambda: (trainer.keep(metrics), trainer.finish()))
        self._saving = Saving(0)
        self._saving.begin()
        self.checkpoint = _seconds(lambda: (trainer.save(), trainer.finish()))
        self._saving.end()

    def of(self, plan: Plan, step: float) -> float:
        """All of them in a run whose steps take so many seconds."""
        evaluations = math.ceil(plan.steps / plan.eval_every) * (self.evaluation + self.export)
        checkpoints = math.ceil(plan.steps / self._saving.steps(step)) * self.checkpoint
        return self.compiling + evaluations + checkpoints

    def __str__(self) -> str:
        return (
            f"evaluation {self.evaluation:.2f} s (compiled once: {self.compiling:.1f} s), export "
            f"{self.export:.2f} s, checkpoint {self.checkpoint:.2f} s"
        )


def _some(plan: Plan) -> Any:
    stream = Stream(plan.store, plan.mesh, [plan.view])
    return (dealt for dealt, _ in zip(stream.batches(), range(1 + _TIMED), strict=False))


def _train(trainer: Trainer, batches: list[Batch]) -> None:
    for batch in batches:
        trainer.take(batch)
    trainer.finish()


def _plain_step(plan: Plan, trainer: Trainer, batches: list[Batch]) -> float:
    """Seconds of a step of the plain implementation, in float32, on the same batches."""
    note("bench: compiling the plain implementation for the same chats")
    _, params, frozen = trainer.measured
    steps = plan.config.ttt_steps
    weights_K = DECAY ** jnp.arange(steps, dtype=jnp.float32)

    def gradients(params: Params, frozen: Frozen, batch: Batch) -> Any:
        n = batch.tokens.size
        counts_BT = jnp.zeros(n + 1, bool).at[batch.targets].set(True)[:n].reshape(batch.tokens.shape)
        wide = {name: getattr(batch, name).astype(jnp.float32) for name in ("aux_hidden", "last_hidden")}
        given = batch._replace(**wide), counts_BT, weights_K / batch.count[0].astype(jnp.float32)
        loss = partial(plain.loss, plan.head)
        found, by_params = jax.value_and_grad(loss)(params, frozen, *given)
        return (found, jnp.zeros(steps), jnp.zeros(steps)), by_params

    params, frozen, *held = jax.tree.map(jnp.asarray, jax.device_get((params, frozen, *batches)))
    rule = plan.optimizer(lambda _: 1e-4, trainer.no_sample())
    state = State(params, rule.init(params), jnp.int32(0))
    step = jax.jit(train_step(gradients, rule)).lower(state, frozen, held[0]).compile()
    jax.block_until_ready(step(state, frozen, held[0]))
    return _seconds(lambda: [jax.block_until_ready(step(state, frozen, one)) for one in held[1:]]) / _TIMED


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
