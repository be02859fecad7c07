"""Ctrl-C and SIGTERM, which a pre-empted machine gets, seen between two steps instead of within one."""

import signal
import threading
from typing import Any, Self


class Stop:
    """While entered, the first signal only sets `asked`; a second one interrupts at once.

    Only the main thread gets signals; elsewhere `asked` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
