"""Ctrl-C and SIGTERM, which a pre-empted machine gets, end a stage between two steps: one line, nothing lost.

Python runs a signal's handler wherever it happens to be, also inside callbacks whose exceptions are printed
and forgotten (JAX has one in the garbage collector). So the first signal only leaves a mark, which is looked
at between steps, and the command line ends at the second one, as if it were killed, without an exception.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ClassVar, Protocol, Self, TypeVar

from common.errors import EyasError, RestartError

Value = TypeVar("Value", covariant=True)
STOPPED = "stopped; the same command goes on from what is kept"
_NOTE = "\nstopping at the next step; once more stops at once\n"
_CHECK_SECONDS = 0.2
# Seconds after which a request that nobody looks at is obeyed, and one of SIGTERM in any case, what is being
# saved or not: machines go ten after theirs.
_UNSEEN, _MOST = 6.0, 9.0
leave: Callable[[int], None] = os._exit  # of a pod's process the end that the others hear of (common/pod.py)
_checked: list["Stop"] = []  # those that `check` looks at, the innermost last


class Awaited(Protocol[Value]):
    """A future of concurrent.futures, or of TensorStore."""

    def done(self) -> bool: ...

    def result(self, timeout: float | None = None) -> Value: ...


class Stopped(KeyboardInterrupt):
    """Asked to stop by the signal of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


def exit_code(number: int) -> int:
    """Job runners start again what exits with 42, and SIGTERM is how they take a machine away."""
    return RestartError.exit_code if number == signal.SIGTERM else 130


def stopped(by: KeyboardInterrupt, text: str) -> EyasError:
    """The error of a stage that was asked to stop, and says how far it came."""
    told = EyasError(text)
    told.exit_code = exit_code(getattr(by, "number", signal.SIGINT))
    return told


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may read it
        os.write(2, text.encode())  # print may be what the signal has interrupted


def _end(number: int, _: object) -> None:
    _say(f"{os.linesep * os.isatty(2)}Error: {STOPPED}\n")  # below a bar
    leave(exit_code(number))


def end_at_once() -> None:
    """From now on a signal ends the program with one line: outside of a `Stop`, and a second one inside."""
    Stop.again = staticmethod(_end)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)


def _raise(number: int, _: object) -> None:
    raise Stopped(number)


class Stop:
    """While entered, the first SIGINT or SIGTERM only sets `asked`; a second one interrupts at once.

    With `everywhere`, `stopping.check` looks at it too, which every `Progress` calls at every step. Only the
    main thread gets signals; elsewhere `asked` stays False. What such a Stop around it was asked, it is.

    `hurried`, for where nothing is to be saved yet: a request that nobody has looked at after some seconds, a
    library compiles or waits for a server say, ends the program as a second one does. Around a whole command
    it also gives a SIGTERM its time: what is saved when that is over is kept, a server that does not answer
    is not waited for.
    """

    again: ClassVar[Callable[[int, object], None]] = staticmethod(_raise)  # what a second signal does

    def __init__(self, everywhere: bool = False, hurried: bool = False) -> None:
        self.asked = False
        self._number = 0
        self._everywhere, self._hurried = everywhere, hurried
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked:
            self._hurried = False
            raise Stopped(self._number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
            for outer in _checked[-1:]:
                self.asked, self._number = outer.asked, outer._number
                outer._hurried = False
        if self._everywhere:
            _checked.append(self)
        return self

    def _ask(self, number: int, frame: object) -> None:
        again, self.asked, self._number = self.asked, True, number
        if again:
            self.again(number, frame)
        _say(_NOTE)
        if Stop.again is _end and not again:  # else it is somebody else's program
            threading.Thread(target=self._obey, daemon=True).start()

    def _obey(self) -> None:
        time.sleep(_UNSEEN)
        if self._hurried:
            _end(self._number, None)
        time.sleep(_MOST - _UNSEEN)
        if self._number == signal.SIGTERM and _checked:  # else the command is at its end
            _end(self._number, None)

    def __exit__(self, *_: object) -> None:
        self._hurried = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._everywhere:
            _checked.remove(self)


def interruptible(work: Callable[[], Value], check: Callable[[], None]) -> Value:
    """What `work()` gives, which may take minutes outside of Python: in a thread, with `check` called
    meanwhile, whose exception leaves the work alone to its end or that of the program."""
    found: Future[Value] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return awaited(found, check)


def awaited(found: Awaited[Value], check: Callable[[], None]) -> Value:
    """The result of `found`, with `check` called meanwhile, whose exception leaves the work alone."""
    while not found.done():
        with suppress(TimeoutError):
            return found.result(timeout=_CHECK_SECONDS)
        check()
    return found.result()


def check() -> None:
    """Raises Stopped in the main thread if the innermost `Stop(everywhere=True)` has been asked to."""
    if _checked and threading.current_thread() is threading.main_thread():
        _checked[-1].check()
