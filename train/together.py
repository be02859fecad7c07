"""Trainers that take the batches of one stream: each reading of the store serves all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from common import pod
from common.errors import EyasError, MachineError
from common.progress import Progress
from common.stopping import Stop
from train.batch import Batch
from train.evaluate import score_all
from train.names import LENGTH
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


class _Group:
    """The trainers that go on, in `live`, and the seconds of evaluations and checkpoints, in `pausing`."""

    def __init__(
        self,
        trainers: Sequence[Trainer],
        stop: Stop,
        require_ours: Callable[[], None],
        failed: Callable[[Trainer, EyasError], None],
    ):
        self.live, self.pausing = list(trainers), 0.0
        self._stop, self._require_ours, self._failed = stop, require_ours, failed

    def check(self) -> None:
        """Whether to go on; what is said here is said on all processes."""
        self._stop.check()
        pod.check()
        if pod.is_first():
            self._require_ours()  # before anything is saved

    @contextmanager
    def _alone(self, trainer: Trainer) -> Iterator[None]:
        """What this trainer's head comes to nothing by ends it, and no other."""
        try:
            yield
        except MachineError:
            raise
        except EyasError as error:
            self.live.remove(trainer)
            self._failed(trainer, error)

    def each(self, action: Callable[[Trainer], None], of: Sequence[Trainer]) -> None:
        """Does it for those of them that go on."""
        for trainer in [one for one in of if one in self.live]:
            with self._alone(trainer):
                action(trainer)

    def take(self, trainer: Trainer, batch: Batch) -> None:
        """One step, if this trainer goes on."""
        if trainer in self.live:
            with self._alone(trainer):
                trainer.compile(batch, self.check)
                trainer.take(batch)

    def evaluate(self) -> None:
        """Measures those that are to be measured now, from one reading of the held-out rows."""
        due = [one for one in self.live if one.is_evaluated]
        if not due:
            return
        measured = [one.measured for one in due if one.evaluator]  # all or none: they have one source
        label = f"evaluate step {due[0].step}"
        found = score_all(measured, label, self.check) if measured else [{}] * len(due)
        metrics = dict(zip(due, found, strict=True))
        self.each(lambda one: one.keep(metrics[one]), due)

    def retire(self) -> None:
        """Those that are done have everything on disk, and go on no more."""
        self.each(Trainer.finish, [one for one in self.live if one.done])
        self.live = [one for one in self.live if not one.done]

    def pause(self, stepped: Sequence[Trainer]) -> None:
        """What is to be done behind a step of these."""
        began = time.monotonic()
        self.evaluate()
        self.each(Trainer.save, [one for one in stepped if one.is_saved])
        self.retire()
        self.pausing += time.monotonic() - began

    def save_all(self) -> None:
        """The states of all, whatever their step."""
        self.each(Trainer.save, self.live)
        self.finish()

    def finish(self) -> None:
        """Waits until everything is on disk."""
        self.each(Trainer.finish, self.live)


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
    group = _Group(trainers, stop, require_ours, failed)
    source = trainers[0].plan.source
    source.forget_tensors()  # every head has taken what it takes of them
    stream = Stream(source.store, source.mesh, [one.plan.view for one in trainers], source.memory)
    reading = stream.reading([one.plan.steps if one.done else one.step for one in trainers])
    tokens = trainers[0].plan.config.batch_rows * source.store.length
    before = max(0, max(one.plan.steps for one in trainers) - len(reading))
    try:
        group.evaluate()  # what a stopped run had not come to
        group.retire()
        with Progress(label, (before + len(reading)) * tokens, "tok", done=before * tokens) as progress:
            for dealt in stream.batches(reading, group.check):
                for number, batch in dealt:
                    group.take(trainers[number], batch)
                progress.update(tokens, _status(group.live))
                group.pause([trainers[number] for number, _ in dealt])
                if not group.live:
                    break
    except KeyboardInterrupt:
        group.save_all()
        raise
    group.finish()
    return Spent(stream.waited, group.pausing)
