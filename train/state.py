"""state/ of a run: what is saved to continue from, and how it is read again."""

import inspect
import json
import logging
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from common import pod, schema, storage
from common.errors import EyasError, MachineError
from common.library_errors import explained, is_librarys, is_refusal, library_errors
from common.schema import Count, Crc32, TypedDict
from common.texts import first_line
from train.step import State

_KEPT = 2  # a machine that dies while saving leaves the one before
_ADVICE = "delete that step's folder to continue from the state before it"


class _Evaluation(TypedDict):
    step: Count


class _Noted(TypedDict):
    """Beside a saved state: its checksums, the seconds that the run took up to it, and the evaluations of the
    heads in best/ and last/."""

    sums: dict[str, Crc32]
    seconds: float
    best: _Evaluation | None
    last: _Evaluation
    crc32: Crc32  # of the others, and the step


@jax.jit
def _sums(state: State) -> dict[str, jax.Array]:
    """{path of an array: the sum of its bits, uint32}: exact in any order, so the same on any mesh."""

    def total(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)

    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): total(x) for path, x in leaves}


def _checksums(state: State) -> dict[str, int]:
    return {name: int(x) for name, x in jax.device_get(_sums(state)).items()}


def _crc32(step: int | None, noted: dict[str, Any]) -> int:
    rest = {name: value for name, value in noted.items() if name != "crc32"}
    return zlib.crc32(json.dumps([step, rest], sort_keys=True).encode())


def _quiet() -> None:
    """What orbax raises is told once: not by its logs too, nor by what it had begun beside it and leaves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if sys.unraisablehook is not _unraisable:
        _others.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable


_others: list[Callable[[Any], Any]] = []  # the hook that was there before


def _unraisable(found: Any) -> None:
    """Tells what is raised where nobody can catch it, but for what a read or write that has failed leaves:
    coroutines, and TensorStore's requests that end after their event loop."""
    if not inspect.iscoroutine(found.object) and str(found.exc_value) != "Event loop is closed":
        _others[-1](found)


class Saved:
    """The folder `state/` of a run: saved states, written in the background, whole or not at all.

    On a disk, a state is whole once its folder has its name; in a bucket, once it holds orbax's object
    `commit_success.txt`, written last.
    """

    _last: ClassVar["Saved | None"] = None  # of this process, the one that has begun to save last

    def __init__(self, out: str):
        _quiet()
        self._place = storage.join(out, "state")
        path = self._place
        if storage.is_remote(path):
            os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is, it has no gs:// of its own
        else:
            path = os.path.abspath(storage.local_path(path))
            for folder, _, names in os.walk(path):
                for name in names:  # orbax would wait for a pipe's writer for ever
                    storage.require_no_device(os.path.join(folder, name))
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, create=True)
        try:  # it makes the folder, and looks at what is there
            self._manager = ocp.CheckpointManager(path, options=options)
        except Exception as error:
            no_folder = isinstance(error, IsADirectoryError | NotADirectoryError)
            if is_librarys(error) or (isinstance(error, OSError) and not no_folder):
                raise explained(error, self._place) from error
            raise EyasError(
                f"{self._place} holds a step that cannot be read ({first_line(error)}); {_ADVICE}"
            ) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax and its background threads raise what they like: a MachineError of one line."""
        try:
            with library_errors(self._place):
                yield
        except EyasError:
            raise
        except Exception as error:
            raise MachineError(
                f"{self._place} cannot be written ({first_line(error)}); mend that and run the same command "
                "again; what is complete is kept"
            ) from error

    def step(self) -> int | None:
        """The newest saved step, None if there is none."""
        return self._manager.latest_step()

    def restore(self, like: State, where: State) -> tuple[State, dict[str, Any]]:
        """(the newest state, in the shapes and dtypes of `like`, lying as `where` says; what `save` was given
        beside it, by name)."""
        wanted = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like, where)
        step = self.step()
        found = self._read(step, state=ocp.args.StandardRestore(wanted))
        state, noted = found["state"], found["noted"]
        damaged = [name for name, found in _checksums(state).items() if found != noted["sums"].get(name)]
        if damaged:
            raise EyasError(f"{self._place}/{step} is damaged: {damaged[0]} is not what was saved; {_ADVICE}")
        return state, noted

    def noted(self) -> tuple[int, dict[str, Any]] | None:
        """(step, last) of the newest state, of which nothing else is read; None if there is none."""
        step = self.step()
        return None if step is None else (step, self._read(step)["noted"]["last"])

    def _read(self, step: int | None, **wanted: ocp.args.CheckpointArgs) -> dict[str, Any]:
        """What is `wanted` of a saved state by name, and "noted", unchanged since `save` wrote it."""
        place, args = f"{self._place}/{step}", ocp.args.Composite(noted=ocp.args.JsonRestore(), **wanted)
        try:
            found = dict(self._manager.restore(step, args=args).items())
        except Exception as error:  # orbax, TensorStore and JSON have exceptions of many kinds
            if is_refusal(error):
                raise explained(error, place) from error
            raise EyasError(f"{place} cannot be read ({first_line(error)}); {_ADVICE}") from error
        noted = schema.check(_Noted, found["noted"], f"{place}/noted", _ADVICE)
        if noted["crc32"] != _crc32(step, noted):
            raise EyasError(f"{place}/noted is not what was saved at step {step}; {_ADVICE}")
        return found | {"noted": noted}

    @property
    def is_busy(self) -> bool:
        """Whether something is still being written."""
        return self._manager.is_saving_in_progress()

    def save(self, state: State, best: dict[str, Any] | None, last: dict[str, Any], seconds: float) -> None:
        """Begins to save; waits only for an earlier save. MachineError if that or this one fails."""
        noted: dict[str, Any] = {"sums": _checksums(state), "seconds": float(seconds)}
        noted |= {"best": best, "last": last}
        noted["crc32"] = _crc32(int(state.step), noted)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), noted=ocp.args.JsonSave(noted))
        if pod.size() > 1 and Saved._last not in (None, self):
            Saved._last.finish()  # the names that processes meet by are orbax's, the same for every folder
        Saved._last = self
        with self._writing():
            self._manager.save(int(state.step), args=args, force=True)

    def finish(self) -> None:
        """Waits until everything is on disk. MachineError if it does not get there."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """`finish`, and no more."""
        if Saved._last is self:
            Saved._last = None
        with self._writing():
            self._manager.close()
