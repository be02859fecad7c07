"""Ctrl-C and SIGTERM, which a pre-empted machine gets, end a stage with one line and nothing lost."""

import signal
import sys
import threading
from typing import Any, Self


class Stop:
    """While entered, the first signal only sets `asked`; a second one interrupts at once.

    With `at_once` the first one interrupts too. Python runs a signal's handler wherever it happens to be,
    also in callbacks whose exceptions it prints and forgets (JAX has one in the garbage collector): call
    `check` between two steps, so that no request is lost; the print is left out.
    Only the main thread gets signals; elsewhere `asked` stays False.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.asked = False
        self._at_once = at_once
        self._before: dict[int, Any] = {}
        self._report = sys.unraisablehook

    def check(self) -> None:
        """KeyboardInterrupt if a signal has come."""
        if self.asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
            self._report, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def _ask(self, *_: object) -> None:
        interrupt = self.asked or self._at_once
        self.asked = True
        if interrupt:
            raise KeyboardInterrupt

    def _unraisable(self, found: Any) -> None:
        if found.exc_type is not KeyboardInterrupt:
            self._report(found)

    def __exit__(self, *_: object) -> None:
        if self._before:
            sys.unraisablehook = self._report
        for number, handler in self._before.items():
            signal.signal(number, handler)
