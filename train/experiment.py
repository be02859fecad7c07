"""Who may work in a run's folder: one pod, on the experiment that experiment.json says."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from pydantic import Field

from common import pod, schema, storage
from common.config import differences, to_json
from common.errors import EyasError
from common.lock import FILE as LOCK
from common.lock import locked, watched
from common.schema import TypedDict
from train.names import EXPERIMENT, FOLDERS
from train.plan import Plan


class _Experiment(TypedDict):
    identity: dict[str, Any]
    calls: Annotated[list[dict[str, Any]], Field(min_length=1)]


@contextmanager
def claimed(plan: Plan) -> Iterator[Callable[[], None]]:
    """Holds the plan's folder, for this pod alone, with the plan in its experiment.json.

    Yields a check, for the first process, that raises EyasError once another one has it.

    EyasError if another process is at work there, the folder holds another experiment or anything else, or
    it is not the same folder on all hosts.
    """
    with ExitStack() as held:
        check: Callable[[], None] = lambda: None  # noqa: E731
        with pod.together():
            if pod.is_first():
                check = held.enter_context(_claimed(plan))
        with pod.together():
            if not pod.is_first() and not require_own(plan):
                raise EyasError(
                    f"{plan.config.out} is not the same folder on every host; name a gs:// prefix, or a "
                    "folder that the hosts share"
                )
        yield check


@contextmanager
def _claimed(plan: Plan) -> Iterator[Callable[[], None]]:
    out = plan.config.out
    require_own(plan)
    with locked(out) as require_ours, _nothing_left(out):
        calls, call = _calls(plan), _call(plan)
        if calls[-1:] != [call]:
            made = {"identity": plan.identity, "calls": [*calls, call]}
            storage.write_json(storage.join(out, EXPERIMENT), made)
        yield require_ours


@contextmanager
def _nothing_left(out: str) -> Iterator[None]:
    """If somebody removes the folder, what this process writes in its place until it sees that goes as well;
    if he has put anything else there, all of it stays."""
    if storage.is_remote(out):
        yield
        return
    path = storage.local_path(out)
    with watched(path) as is_same:
        try:
            yield
        finally:
            with suppress(OSError):
                if not is_same():
                    left = {name for name in os.listdir(path) if not storage.is_partial(name)}
                    if left <= set(FOLDERS):  # these are made again where they are gone
                        shutil.rmtree(path)


def _call(plan: Plan) -> dict[str, Any]:
    """What experiment.json keeps of this process: the options that a later one may change, and versions."""
    names = ("eyas", "jax", "jaxlib", "optax", "numpy")
    return {
        "config": to_json(plan.config),
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "versions": {name: _version(name) for name in names},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Eyas run from a checkout
        return "not installed"


def require_own(plan: Plan) -> bool:
    """Whether the folder has this plan's experiment already. EyasError if it has anything else."""
    return bool(_calls(plan))


def _calls(plan: Plan) -> list[dict[str, Any]]:
    """The calls that the folder has had, each unlike the one before; [] where it has no experiment yet.
    EyasError if it has anything else."""
    out = plan.config.out
    place = storage.join(out, EXPERIMENT)
    if not storage.exists(place):
        foreign = [n for n in storage.list_names(out) if n != LOCK and not storage.is_partial(n)]
        if foreign:
            raise EyasError(f"{out} already holds {foreign[0]}; name a new or an empty folder")
        return []
    found = schema.read(_Experiment, place, "restore the file, or name a new folder")
    different = differences(found["identity"], plan.identity)
    if different:
        raise EyasError(
            f"{out} holds another experiment: {'; '.join(different[:5])}; use the same options to continue "
            "it, or name a new folder"
        )
    return found["calls"]
