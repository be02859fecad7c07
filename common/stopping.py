"""Ctrl-C and SIGTERM, which a pre-empted machine gets, end a stage between two steps: one line, nothing lost.

Python runs a signal's handler wherever it happens to be, also inside callbacks whose exceptions are printed
and forgotten (JAX has one in the garbage collector). So the first signal only leaves a mark, which is looked
at between steps.
"""

import os
import signal
import threading
from typing import Any, Self

_NOTE = b"\nstopping at the next step; once more stops at once\n"
_checked: list["Stop"] = []  # those that `check` looks at, the innermost last


class Stopped(KeyboardInterrupt):
    """Asked to stop by the signal of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Stop:
    """While entered, the first SIGINT or SIGTERM only sets `asked`; a second one interrupts at once.

    With `everywhere`, `stopping.check` looks at it too, which every `Progress` calls at every step. Only the
    main thread gets signals; elsewhere `asked` stays False.
    """

    def __init__(self, everywhere: bool = False) -> None:
        self.asked = False
        self._number = 0
        self._everywhere = everywhere
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked:
            raise Stopped(self._number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        if self._everywhere:
            _checked.append(self)
        return self

    def _ask(self, number: int, _: object) -> None:
        again, self.asked, self._number = self.asked, True, number
        if again:
            raise Stopped(number)
        os.write(2, _NOTE)  # print may be what the signal has interrupted

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._everywhere:
            _checked.remove(self)


def check() -> None:
    """Raises Stopped in the main thread if the innermost `Stop(everywhere=True)` has been asked to."""
    if _checked and threading.current_thread() is threading.main_thread():
        _checked[-1].check()
