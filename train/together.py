"""Trainers that take the batches of one stream: each reading of the store serves all of them."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from common import pod
from common.errors import EyasError, MachineError
from common.progress import Progress
from common.stopping import Stop
from train.batch import Batch
from train.evaluate import score_all
from train.metrics import LENGTH
from train.stream import Stream
from train.trainer import Trainer


class Spent(NamedTuple):
    """Seconds: of waiting for data, and of evaluations and checkpoints in which no step was done."""

    waiting: float
    pausing: float


def raise_it(trainer: Trainer, error: EyasError) -> None:
    """For a run that is alone: its end is the end."""
    raise error


def _status(live: Sequence[Trainer]) -> str:
    """How it goes: of one head, or of the best of several; of the first as long as none was measured."""
    if not live:
        return ""
    best = max(live, key=lambda one: (one.exported.best or {}).get(LENGTH, 0.0))
    if len(live) == 1:
        return best.status
    which = f"{best.name} is best" if LENGTH in (best.exported.best or {}) else best.name
    return f"{len(live)} heads" + (f", {which}: {best.status}" if best.status else "")


def train(
    trainers: Sequence[Trainer],
    label: str,
    stop: Stop,
    require_ours: Callable[[], None],
    failed: Callable[[Trainer, EyasError], None],
) -> Spent:
    """Gives every trainer the batches that it has not had yet; returns what else all spent time on.

    A trainer whose head comes to nothing is given to `failed`, and the others go on, unless that raises. What
    the machine does ends all. If asked to stop, all states are saved first.
    """
    live, pausing = list(trainers), 0.0

    def each(action: Callable[[Trainer], None], of: Sequence[Trainer]) -> None:
        for trainer in [one for one in of if one in live]:
            try:
                action(trainer)
            except MachineError:
                raise
            except EyasError as error:
                live.remove(trainer)
                failed(trainer, error)

    def check() -> None:
        """Whether to go on; what is said here is said on all processes."""
        stop.check()
        pod.check()
        if pod.is_first():
            require_ours()  # before anything is saved

    def take(trainer: Trainer, batch: Batch) -> None:
        trainer.compile(batch, check)
        trainer.take(batch)

    def evaluate() -> None:
        due = [one for one in live if one.is_evaluated]
        if not due:
            return
        measured = [one.measured for one in due if one.evaluator]  # all or none: they have one source
        label = f"evaluate step {due[0].step}"
        found = score_all(measured, label, check) if measured else [{}] * len(due)
        metrics = dict(zip(due, found, strict=True))
        each(lambda one: one.keep(metrics[one]), due)

    def retire() -> None:
        each(Trainer.finish, [one for one in live if one.done])
        live[:] = [one for one in live if not one.done]

    source = trainers[0].plan.source
    source.forget_tensors()  # every head has taken what it takes of them
    stream = Stream(source.store, source.mesh, [one.plan.view for one in trainers], source.memory)
    reading = stream.reading([one.plan.steps if one.done else one.step for one in trainers])
    tokens = trainers[0].plan.config.batch_rows * source.store.length
    before = max(0, max(one.plan.steps for one in trainers) - len(reading))
    try:
        evaluate()  # what a stopped run had not come to
        retire()
        with Progress(label, (before + len(reading)) * tokens, "tok", done=before * tokens) as progress:
            for dealt in stream.batches(reading, check):
                for number, batch in dealt:
                    each(lambda one, batch=batch: take(one, batch), [trainers[number]])
                progress.update(tokens, _status(live))
                began = time.monotonic()
                evaluate()
                each(Trainer.save, [trainers[number] for number, _ in dealt if trainers[number].is_saved])
                retire()
                pausing += time.monotonic() - began
                if not live:
                    break
    except KeyboardInterrupt:
        each(Trainer.save, live)
        each(Trainer.finish, live)
        raise
    each(Trainer.finish, live)
    return Spent(stream.waited, pausing)
