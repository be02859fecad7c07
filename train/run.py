"""A training run: one stream of batches, which a trainer takes one after the other."""

import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import jax
import numpy as np

from common import pod
from common.config import to_json
from common.device_errors import device_errors
from common.progress import note
from common.stopping import Stop, stopped
from train import servers, together
from train.config import TrainConfig
from train.experiment import claimed
from train.plan import Plan
from train.planning import make_plan
from train.trainer import Trainer

__all__ = ["TrainConfig", "run"]

SMALLER = (
    "give a larger --dp or --accumulate, fewer --batch-rows, more chips to a row (--sp), or shorter rows "
    "(prepare --length)"
)


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains a head from `config.store` into `config.out`, or continues: the weights come out the same. On
    several processes each calls this, with the same configuration.

    Returns {"out", "steps", "steps_before", "rows", "tokens", "seconds", "tokens_per_s", "stall", "pace",
    "best", "last"}, of this run but for steps, best and last; "stall" is the share of waiting for data,
    "pace" that of evaluations and checkpoints. EyasError for whatever is wrong, before anything is computed
    or written where it can be known before, and after Ctrl-C or SIGTERM, which save the state.
    """
    start = time.monotonic()
    note(f"train: checking {config.store}")
    with pod.together():
        plan = make_plan(config)
    pod.require_same(to_json(config) | plan.identity | {"version of jax": jax.__version__}, "options")
    # Some trackers print; stdout has the run's result alone.
    with claimed(plan) as require_ours, device_errors(SMALLER), redirect_stdout(sys.stderr):
        note(_announce(plan))
        with Trainer(plan) as trainer, Stop() as stop:
            try:
                found = _train(plan, trainer, stop, require_ours)
            except KeyboardInterrupt as asked:
                text = (
                    f"train stopped; step {trainer.saved_step} of {plan.steps} is saved in "
                    f"{config.out}/state: continue with the same command"
                )
                raise stopped(asked, text) from None
    return found | {"seconds": round(time.monotonic() - start, 3)}


def _announce(plan: Plan) -> str:
    B, T = plan.config.batch_rows, plan.store.length
    limits = plan.head.limits(plan.store.target_config())
    parameters = sum(int(np.prod(x.shape)) for x in plan.shapes().values())
    return (
        f"train: {plan.steps} steps of {B} x {T} tokens, {plan.counted:,} counted positions an "
        f"epoch; a head of {parameters / 1e6:.1f}M parameters, draft vocabulary {len(plan.draft_ids):,}; "
        f"an evaluation of {plan.eval_rows} rows every {plan.eval_every} steps, a checkpoint "
        + (f"every {plan.save_every}" if plan.save_every else "as often as its cost allows")
        + "".join(f"\ntrain: {line}" for line in servers.sentences(limits))
    )


def _train(plan: Plan, trainer: Trainer, stop: Stop, require_ours: Callable[[], None]) -> dict[str, Any]:
    """Gives the trainer every batch that it has not had yet. If it is stopped, its state is saved."""
    first, tokens, began = trainer.step, plan.config.batch_rows * plan.store.length, time.monotonic()
    spent = together.train([trainer], "train", stop, require_ours, together.raise_it)
    seconds, steps = time.monotonic() - began, trainer.step - first
    return {
        "out": plan.config.out,
        "steps": trainer.step,
        "steps_before": first,
        "rows": steps * plan.config.batch_rows,
        "tokens": steps * tokens,
        "tokens_per_s": round(steps * tokens / seconds, 1),
        "stall": round(spent.waiting / seconds, 4),
        "pace": round(spent.pausing / seconds, 4),
        "best": trainer.exported.best,
        "last": trainer.exported.last,
    }
