"""Where the lines of metrics.jsonl are told as well: wandb, TensorBoard, MLflow and trackio.

A tracker takes a run's configuration once, and then numbers by name. OUT/trackers.json says under which id
each knows the run, and up to which step it was told: a run that is continued goes on there, and a step that
is computed once more, to the same numbers, is not told twice.
"""

import importlib
import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any, Protocol

from common import schema, storage
from common.errors import EyasError
from common.progress import note
from common.schema import Count, TypedDict

FILE = "trackers.json"
FOLDER = "tensorboard"  # of event files, in the run's own
_PROJECT = "eyas"  # unless the tracker's own environment variable names one
_SECONDS = 5.0  # between two tellings: a bucket is written at each


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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def require(names: Sequence[str], out: str) -> None:
    """EyasError for a tracker whose package is missing, or that cannot tell of a run in `out`."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, which wandb makes, is no package
            raise EyasError(f"--log-to {name} needs a package that is not here: pip install 'eyas[{name}]'")
        try:
            importlib.import_module(name)
        except Exception as error:  # of a version that does not go with the others that are here
            raise EyasError(
                f"--log-to {name}: its package here cannot be used ({_reason(error)}); pip install --upgrade "
                f"'eyas[{name}]'"
            ) from None
        if name == "tensorboard" and storage.is_remote(out):
            raise EyasError(f"--log-to tensorboard appends to files, which {out} has none of; leave it out")


class _Told(TypedDict):
    """`id`: of the run, to a tracker; the last steps of which training and evaluation lines were told."""

    id: str
    train: Count
    eval: Count


def _part(line: dict[str, Any]) -> str:
    return "eval" if "evaluation" in line else "train"


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by name: `train/loss`, `eval/acc/0` of the first draft step."""
    part, found = _part(line), {}
    for name, value in line.get("evaluation", line).items():
        if isinstance(value, list):
            found |= {f"{part}/{name}/{k}": float(x) for k, x in enumerate(value)}
        elif name != "step":
            found[f"{part}/{name}"] = float(value)
    return found


class Logs:
    """The trackers of one run. One that fails is named and told no more; the run goes on."""

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
        self._trackers: dict[str, Tracker] = {}
        self._told: dict[str, _Told] = {}
        self._waiting: list[dict[str, Any]] = []
        self._sent = time.monotonic()
        if not names:
            return
        if storage.exists(self._place):
            advice = "delete it: the trackers then see a new run"
            self._told = schema.read(dict[str, _Told], self._place, advice)
        for name in dict.fromkeys(names):
            told = self._told.setdefault(name, _Told(id=uuid.uuid4().hex[:8], train=0, eval=0))
            if not done or self._untold(name, before):
                self._try(name, partial(self._open, name, out, told["id"], config))
        storage.write_json(self._place, self._told)
        if self._trackers:
            self._waiting = list(before)
            self._send()

    def _untold(self, name: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in lines if line["step"] > self._told[name][_part(line)]]

    def _open(self, name: str, out: str, identity: str, config: dict[str, Any]) -> None:
        run = os.path.basename(out.rstrip("/"))
        self._trackers[name] = TRACKERS[name](out, run, identity, config)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):  # some print; stdout has the run's result alone
                action()
        except Exception as error:  # of a service or a library of any kind, hours into a run
            self._trackers.pop(name, None)
            note(f"{name} fails, and is told no more of this run: {_reason(error)}; metrics.jsonl has it all")

    def add(self, line: dict[str, Any]) -> None:
        """Tells the trackers of a line, now or a little later."""
        if self._trackers:
            self._waiting.append(line)
            if time.monotonic() - self._sent > _SECONDS:
                self._send()

    def _send(self) -> None:
        """What is told is noted before: who is killed in between leaves a gap and never a double."""
        lines, self._waiting, self._sent = self._waiting, [], time.monotonic()
        new = {name: self._untold(name, lines) for name in self._trackers}
        for name, of_one in new.items():
            for line in of_one:
                self._told[name][_part(line)] = line["step"]
        if any(new.values()):
            storage.write_json(self._place, self._told)
        for name, of_one in new.items():
            self._try(name, partial(_tell, self._trackers[name], of_one))

    def close(self, done: bool) -> None:
        """Tells the last lines; `done`: the run is at its end."""
        if self._trackers:
            self._send()
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.close, done))


def _tell(tracker: Tracker, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        tracker.log(line["step"], numbers_of(line))
