"""Where the lines of metrics.jsonl are told as well: wandb, TensorBoard, MLflow and trackio.

A tracker takes a run's configuration once, and then numbers by name. OUT/trackers.json says under which id
each knows the run, and up to which step it was told: a run that is continued goes on there, and a step that
is computed once more, to the same numbers, is not told twice.
"""

import importlib
import importlib.util
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from common import schema, stopping, storage
from common.errors import EyasError
from common.progress import note
from common.schema import Count, TypedDict
from common.stopping import Stopped
from common.texts import install
from train.names import EVALUATION, METRICS

FILE = "trackers.json"
FOLDER = "tensorboard"  # of event files, in the run's own
_PROJECT = "eyas"  # unless the tracker's own environment variable names one
_SECONDS = 5.0  # between two tellings: a bucket is written at each
_LAST, _STOPPED = 60.0, 4.0  # that a tracker has for the last lines, of a run that is done or that is stopped
_LOOK = 0.1  # between two looks whether the run is asked to stop meanwhile
_silent: set[str] = set()  # did not answer at a run's end: other runs of this process wait for none
_KEPT = f"{METRICS} has it all"


class Tracker(Protocol):
    """One run in a tracker. Whatever its library raises ends the telling and never the run."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Appends the numbers of a step."""
        ...

    def close(self, done: bool) -> None:
        """No more numbers come from this process; `done`: from none."""
        ...


class _Wandb:
    """Obeys wandb's environment variables, WANDB_PROJECT and WANDB_MODE=offline among them."""

    def __init__(self, out: str, name: str, identity: str, config: dict[str, Any]):
        import wandb

        # Neither what is printed nor the code and its repository are sent.
        quiet = wandb.Settings(
            console="off", silent=True, save_code=False, disable_git=True, disable_job_creation=True
        )
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        named = {"project": project, "name": name, "id": identity, "config": config}
        folder = None if storage.is_remote(out) else storage.local_path(out)
        self._run = wandb.init(**named, resume="allow", reinit="create_new", settings=quiet, dir=folder)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0)


class _Tensorboard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: str, name: str, identity: str, config: dict[str, Any]):
        from tensorboard.summary import Writer

        self._writer = Writer(os.path.join(storage.local_path(out), FOLDER))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()  # who is killed next has told it

    def close(self, done: bool) -> None:
        self._writer.close()


class _Mlflow:
    """Obeys MLflow's environment variables, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME among them."""

    _CHARACTERS = 500  # of a parameter's value, in the oldest of its stores

    def __init__(self, out: str, name: str, identity: str, config: dict[str, Any]):
        import mlflow
        from mlflow.entities import Metric, Param

        self._client, self._metric = mlflow.MlflowClient(), Metric
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(project)
        known = self._client.search_runs([place], f"tags.eyas = '{identity}'", max_results=1)
        if known:
            self._run = known[0].info.run_id
            self._client.update_run(self._run, "RUNNING")
            return
        self._run = self._client.create_run(place, tags={"eyas": identity}, run_name=name).info.run_id
        params = [Param(key, str(value)[: self._CHARACTERS]) for key, value in config.items()]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._run, [self._metric(n, x, now, step) for n, x in numbers.items()])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


class _Trackio:
    """Obeys trackio's environment variables, TRACKIO_DIR and TRACKIO_PROJECT among them."""

    def __init__(self, out: str, name: str, identity: str, config: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        named = {"project": project, "name": f"{name}-{identity}", "config": config}
        self._run = trackio.init(**named, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, done: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[str, str, str, dict[str, Any]], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _Tensorboard,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def require(names: Sequence[str], out: str) -> None:
    """EyasError for a tracker whose package is missing, or that cannot tell of a run in `out`."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, which wandb makes, is no package
            raise EyasError(f"--log-to {name} needs a package that is not here: {install(name)}")
        try:
            importlib.import_module(name)
        except Exception as error:  # of a version that does not go with the others that are here
            raise EyasError(
                f"--log-to {name}: its package here cannot be used ({_reason(error)}); "
                f"{install(name)} --upgrade"
            ) from None
        if name == "tensorboard" and storage.is_remote(out):
            raise EyasError(f"--log-to tensorboard appends to files, which {out} has none of; leave it out")


class _Told(TypedDict):
    """`id`: of the run, to a tracker; the last steps of which training and evaluation lines were told."""

    id: str
    train: Count
    eval: Count


def _part(line: dict[str, Any]) -> str:
    return "eval" if EVALUATION in line else "train"


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: `train/loss`, `eval/acc/0` of the first draft step."""
    part, found = _part(line), {}
    for name, value in line.get(EVALUATION, line).items():
        if isinstance(value, list):
            found |= {f"{part}/{name}/{k}": float(x) for k, x in enumerate(value)}
        elif name != "step":
            found[f"{part}/{name}"] = float(value)
    return found


class _Teller(threading.Thread):
    """A tracker, in a thread of its own: what it does not answer holds up itself and nothing else."""

    def __init__(self, name: str, open_it: Callable[[], Tracker], take: Callable[[list], list]):
        """`take` gives those of some lines that are to be told now, and notes that they are."""
        super().__init__(name=f"tracker {name}", daemon=True)
        self.tracker, self._open, self._take = name, open_it, take
        self._waiting: queue.SimpleQueue[dict[str, Any] | bool] = queue.SimpleQueue()
        self.start()

    def add(self, line: dict[str, Any]) -> None:
        """Tells a line, now or a little later."""
        self._waiting.put(line)

    def end(self, done: bool) -> None:
        """No more lines; `done`: the run is at its end."""
        self._waiting.put(done)

    def run(self) -> None:
        """Whatever a service or a library raises, hours into a run, ends the telling."""
        try:
            tracker, lines = self._open(), []
            while not lines or isinstance(lines[-1], dict):
                lines = self._next()
                for line in self._take([line for line in lines if isinstance(line, dict)]):
                    tracker.log(line["step"], numbers_of(line))
            tracker.close(bool(lines[-1]))
        except (Exception, SystemExit) as error:
            note(f"{self.tracker} fails, and is told no more of this run: {_reason(error)}; {_KEPT}")

    def _next(self) -> list[dict[str, Any] | bool]:
        """What has come within some seconds after the first; the end is the last."""
        found = [self._waiting.get()]
        until = time.monotonic() + _SECONDS
        with suppress(queue.Empty):
            while isinstance(found[-1], dict):
                found.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
        return found


class Logs:
    """The trackers of one run. One that fails is named and told no more; the run goes on, and waits for none
    before its end."""

    def __init__(
        self,
        names: Sequence[str],
        out: str,
        config: dict[str, Any],
        before: Sequence[dict[str, Any]] = (),
        done: bool = False,
    ):
        """`before`: the lines that metrics.jsonl has, of which those are told that were not. Of a run that is
        `done` nothing else is to come."""
        self._place = storage.join(out, FILE)
        self._told: dict[str, _Told] = {}
        self._writing, self._over = threading.Lock(), False
        self._tellers: list[_Teller] = []
        if not names:
            return
        if storage.exists(self._place):
            advice = "delete it: the trackers then see a new run"
            self._told = schema.read(dict[str, _Told], self._place, advice)
        for name in dict.fromkeys(names):
            self._told.setdefault(name, _Told(id=uuid.uuid4().hex[:8], train=0, eval=0))
        storage.write_json(self._place, self._told)
        run = os.path.basename(out.rstrip("/"))
        for name in dict.fromkeys(names):
            if not done or self._untold(name, before):
                open_it = partial(TRACKERS[name], out, run, self._told[name]["id"], config)
                self._tellers.append(_Teller(name, open_it, partial(self._take, name)))
        for line in before:
            self.add(line)

    def _untold(self, name: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in lines if line["step"] > self._told[name][_part(line)]]

    def _take(self, name: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of the lines that the tracker has not been told. It is noted before that they are: who is
        killed in between leaves a gap and never a double."""
        with self._writing:
            new = [] if self._over else self._untold(name, lines)
            for line in new:
                self._told[name][_part(line)] = line["step"]
            if new:
                storage.write_json(self._place, self._told)
        return new

    def add(self, line: dict[str, Any]) -> None:
        """Tells the trackers of a line, now or a little later."""
        for teller in self._tellers:
            if teller.is_alive():
                teller.add(line)

    def close(self, done: bool) -> None:
        """Tells the last lines, and waits for them: long if the run is `done`, and not if it is stopped."""
        for teller in self._tellers:
            teller.end(done)
        end = time.monotonic() + (_LAST if done else _STOPPED)
        for teller in self._tellers:
            while teller.is_alive() and time.monotonic() < end and teller.tracker not in _silent:
                teller.join(_LOOK)
                try:
                    stopping.check()
                except Stopped:  # the run has come to its end, and this is all that is left of it
                    end = min(end, time.monotonic() + _STOPPED)
        self._over = True
        for teller in self._tellers:
            if teller.is_alive():
                _silent.add(teller.tracker)
                note(f"{teller.tracker} does not answer, and is told no more of this run; {_KEPT}")
