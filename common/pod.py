"""The processes of a pod (one a host) run one program: how they find each other and how they agree.

JAX's multi-controller runtime is the engine: every process issues the same computations in the same order.
What it leaves open is kept here. A process that fails before it has issued its part would leave the others
waiting inside a computation for ever, so whatever can fail is done before, and its outcome exchanged:
`together` makes one process's error everybody's, `told` runs a decision on the first one only, and
`require_same` refuses what differs. They go through the key-value store of JAX's coordination service, never
through the devices.

A watch on every process ends it where that is not possible: when a process has failed and the others do not
meet it within some seconds, or when one has not been heard of for `LOST_SECONDS`. Nothing of this runs where
there is one process.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from common import joining, progress, stopping
from common.config import differences
from common.errors import EyasError, MachineError, RestartError
from common.stopping import STOPPED, Stopped, exit_code
from common.texts import first_line

LOST_SECONDS = 15  # without a sign of life a process counts as lost
_BEAT_SECONDS = 1.0
_GRACE_SECONDS = 8.0  # for a process to reach the exchange in which it learns of an error
_PATIENCE_MS = 24 * 3600 * 1000  # processes may be far apart in reading; only the watch ends a wait
_ALIVE, _FAILED, _LEFT, _EXCHANGE = "eyas/alive/", "eyas/failed/", "eyas/left/", "eyas/exchange/"


class _Pod:
    """This process's place in the pod, after `initialise`."""

    client: Any = None
    size = 1
    index = 0
    numbers: Iterator[int] = itertools.count()
    waiter = ThreadPoolExecutor(1, thread_name_prefix="pod-wait")
    heard: ClassVar[dict[str, tuple[str, float]]] = {}  # each process's last beat, and when it came
    lost: ClassVar[set[str]] = set()
    failed: dict[str, float] = {}  # noqa: RUF012 (when a process's failure was first seen)
    stopped: tuple[int, ...] = ()  # the signals by which others are asked to stop


def initialise(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the pod; call it before anything else of JAX.

    Without arguments it is found by itself on Cloud TPU, GKE and Slurm, and elsewhere this process is alone.
    Given by hand it is `coordinator` ("HOST:PORT" of process 0), the number of `processes`, and which of them
    this one is. EyasError for arguments that do not belong together and for a port that is in use,
    RestartError if the others cannot be reached.
    """
    given = (coordinator, processes, process)
    if processes == 1:
        return
    if any(x is not None for x in given):
        joining.check_given(*given)
    # Only here: every verb imports this file, and few need jax. What is asked of its insides has no public
    # name; orbax asks the same.
    import jax
    from jax._src import distributed, xla_bridge

    if jax.distributed.is_initialized() or (coordinator is None and xla_bridge.backends_are_initialized()):
        return  # a second command in one Python program
    if process == 0:
        joining.check_port(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would replace ours
    try:
        joining.join(*given)
    except ValueError as error:
        if coordinator is None:
            return  # no pod was found
        raise EyasError(f"--coordinator {coordinator}: {first_line(error)}; give HOST:PORT") from None
    except (RuntimeError, OSError) as error:
        raise RestartError(
            f"the processes of the pod do not find each other ({first_line(error)}); start the same command "
            "on every host, or give --processes 1 to run alone"
        ) from error
    if jax.process_count() > 1:
        _Pod.client = distributed.global_state.client
        _Pod.size, _Pod.index = jax.process_count(), jax.process_index()
        if not is_first():
            progress.silence()
        stopping.leave = leave
        joining.explain_abort(distributed.global_state.coordinator_address)
        threading.Thread(target=_watch, name="pod-watch", daemon=True).start()


def size() -> int:
    """The number of processes."""
    return _Pod.size


def index() -> int:
    """Which of them this is, from 0."""
    return _Pod.index


def is_first() -> bool:
    """True on the process that decides and announces."""
    return index() == 0


def exchange(value: Any) -> list[Any]:
    """Every process's `value` (plain JSON), in the order of the processes. All call it, in the same order."""
    if size() == 1:
        return [value]
    client, number = _Pod.client, next(_Pod.numbers)
    client.key_value_set(f"{_EXCHANGE}{number}/{index()}", json.dumps(value))
    _wait_for_all(f"{_EXCHANGE}{number}")
    found = dict(client.key_value_dir_get(f"{_EXCHANGE}{number}/"))
    if number:  # all have set this one's, so all have read the one before
        client.key_value_delete(f"{_EXCHANGE}{number - 1}/{index()}")
    return [json.loads(found[f"{_EXCHANGE}{number}/{process}"]) for process in range(size())]


def _wait_for_all(barrier: str) -> None:
    """Waits until all have come. Who is asked to stop meanwhile announces that: the others may not come for
    hours, and Python hears no signal while its main thread waits inside of JAX."""
    asked = False

    def hear() -> None:
        nonlocal asked
        try:
            stopping.check()
        except Stopped as stop:
            if not asked:
                _announce(stop)
            asked = True

    stopping.awaited(_Pod.waiter.submit(_Pod.client.wait_at_barrier, barrier, _PATIENCE_MS), hear)
    if asked:
        _withdraw()


@contextmanager
def together() -> Iterator[None]:
    """What fails inside on one process fails on all, with the same line; they wait for each other here.

    A request to stop (KeyboardInterrupt) counts as a failure: all stop. What was agreed on in a `together`
    inside is not told again. Processes that do not come here after one has failed are ended by the watch.
    """
    if size() == 1:
        yield
        return
    own = None
    try:
        yield
    except BaseException as error:
        if getattr(error, "agreed", False):
            raise
        own = error
        _announce(own)
    failures = exchange(None if own is None else _describe(own))
    if own is not None:
        _withdraw()
    found = own or next((_as_error(p, failure) for p, failure in enumerate(failures) if failure), None)
    if found is not None:
        found.agreed = True
        raise found


def told(decide: Callable[[], Any]) -> Any:
    """What `decide()` gives on the first process, on all of them; plain JSON."""
    decided = None
    with together():
        if is_first():
            decided = decide()
    return exchange(decided)[0]


def require_same(value: dict[str, Any], what: str) -> None:
    """EyasError on every process, naming the fields, unless all have the same `value` (plain JSON)."""
    first, *others = exchange(value)
    for process, other in enumerate(others, 1):
        if different := differences(other, first):
            error = EyasError(
                f"process {process} (there) has other {what} than process 0 (here): "
                f"{'; '.join(different[:3])}; start the same command on every host, with the same files"
            )
            error.agreed = True
            raise error


def check() -> None:
    """Raises Stopped if another process is asked to stop, and waits for this one to hear of it: for inside of
    a `together`, where something is waited for that is this process's alone."""
    if _Pod.stopped:
        raise Stopped(_Pod.stopped[0])


@contextmanager
def announced() -> Iterator[None]:
    """Around a whole stage: an error that leaves it on one process ends the others, wherever they are."""
    try:
        yield
    except BaseException as error:
        if size() > 1:
            _announce(error)
        raise


def _announce(error: BaseException) -> None:
    _Pod.client.key_value_set(f"{_FAILED}{index()}", json.dumps(_describe(error)), allow_overwrite=True)


def _withdraw() -> None:
    """What was announced has been met by all, or is going to be."""
    _Pod.client.key_value_delete(f"{_FAILED}{index()}")


def leave(code: int) -> None:
    """Ends this process at once with `code`; what still writes in the background is dropped.

    Of a pod the first process, which holds the key-value store, goes last. JAX would wait at exit for minutes
    for processes that have gone, and end those that stay with a trace.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, which was told
            stream.flush()
    if size() > 1:
        joining.leaves(code)
        _Pod.client.key_value_set(f"{_LEFT}{index()}", str(code))
    end = time.monotonic() + 2 * _GRACE_SECONDS
    while size() > 1 and is_first() and (code == 0 or time.monotonic() < end):
        gone = {key.removeprefix(_LEFT) for key, _ in _Pod.client.key_value_dir_get(_LEFT)} | _Pod.lost
        if len(gone) == size():
            break
        time.sleep(0.05)
    os._exit(code)


def _describe(error: BaseException) -> dict[str, Any]:
    if number := _signal_of(error):
        return {"text": STOPPED, "code": exit_code(number), "signal": number}
    from common import device_errors  # of jax, which is there where there is a pod

    error = device_errors.explained(error, "compute less at a time, or on more chips") or error
    known = isinstance(error, EyasError)
    text = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
    return {"text": text, "code": error.exit_code if known else MachineError.exit_code, "signal": 0}


def _signal_of(error: BaseException) -> int:
    """The signal by which a process was asked to stop, 0 where it was not."""
    return getattr(error, "number", signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 0


def _as_error(process: int, failure: dict[str, Any]) -> BaseException:
    if failure["signal"]:
        return Stopped(failure["signal"])
    error = EyasError(f"process {process}: {failure['text']}")
    error.exit_code = failure["code"]
    return error


def _watch() -> None:
    """Shows that this process lives, and ends it when another is lost or has failed without being met."""
    import jax

    try:
        for beat in itertools.count():
            _look(str(beat))
            time.sleep(_BEAT_SECONDS)
    except jax.errors.JaxRuntimeError:
        return  # the first process is gone: JAX itself aborts this one


def _look(beat: str) -> None:
    client, now = _Pod.client, time.monotonic()
    client.key_value_set(f"{_ALIVE}{index()}", beat, allow_overwrite=True)
    left = {key.removeprefix(_LEFT): int(code) for key, code in client.key_value_dir_get(_LEFT)}
    for key, value in client.key_value_dir_get(_ALIVE):
        process = key.removeprefix(_ALIVE)
        if process in left or _Pod.heard.get(process, ("", 0.0))[0] != value:
            _Pod.heard[process] = (value, now)
        elif now - _Pod.heard[process][1] > LOST_SECONDS:
            _Pod.lost.add(process)
            _end(f"process {process} is lost; start the same command again", RestartError.exit_code)
    failures = {
        process: {"text": f"ended with {code}", "code": code} for process, code in left.items() if code
    }
    failures |= {k.removeprefix(_FAILED): json.loads(text) for k, text in client.key_value_dir_get(_FAILED)}
    if str(index()) in left:
        return  # it has told its own line
    _Pod.failed = {process: _Pod.failed.get(process, now) for process in failures}
    signals = {process: failure.get("signal", 0) for process, failure in failures.items()}
    _Pod.stopped = tuple(n for process, n in signals.items() if n and process != str(index()))
    for process, at in _Pod.failed.items():
        if now - at > _GRACE_SECONDS:
            who = "" if process == str(index()) else f"process {process}: "
            _end(who + failures[process]["text"], failures[process]["code"])


def _end(line: str, code: int) -> None:
    """Ends the process at once: its main thread may be waiting inside a computation that will never end."""
    print(f"Error: {line}", file=sys.stderr, flush=True)
    leave(code)
