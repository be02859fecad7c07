"""Progress a person can follow: one updating line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import ClassVar, Self

from tqdm import tqdm

from common import stopping
from common.texts import printable, without_secrets

_LINE_SECONDS = 5.0
_shown = True


def silence() -> None:
    """From now on this process shows nothing: of a pod's processes, one tells what happens."""
    global _shown
    _shown = False


def note(text: str) -> None:
    """Prints to stderr at once, above a bar if one is shown, without secrets and what a terminal obeys."""
    if _shown:
        lines = (printable(line) for line in without_secrets(text).split("\n"))
        tqdm.write("\n".join(lines), file=sys.stderr)
        sys.stderr.flush()


class Progress:
    """A bar with rate and time left; where stderr is no terminal, a plain line every 5 seconds.

    Use as a context manager. `total` and the steps of `update` are in `unit`s. What goes on inside of another
    one, an evaluation while training say, takes that one's line and gives it back at its end.
    """

    _bars: ClassVar[list[tqdm]] = []  # of the progresses that go on, the outermost first

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0):
        self._label, self._total, self._unit = label, total, unit
        self._done = self._first = done
        self._text = ""
        self._start = time.monotonic()
        self._printed = self._start
        self._bar = self._make_bar() if _shown and sys.stderr.isatty() else None

    def _make_bar(self) -> tqdm:
        for outer in self._bars:
            outer.clear()
        return tqdm(
            total=self._total,
            initial=self._done,
            unit=self._unit,
            unit_scale=True,
            desc=self._label,
            file=sys.stderr,
            dynamic_ncols=True,  # a line that wraps is no longer one
            position=0,
            leave=not self._bars,
        )

    def __enter__(self) -> Self:
        if self._bar is None:
            self._line()
        else:
            self._bars.append(self._bar)
        return self

    def update(self, steps: int, text: str = "") -> None:
        """Adds `steps`; `text` (a loss, say) is shown behind the rate. Raises Stopped if asked to."""
        stopping.check()
        self._done += steps
        self._text = text or self._text
        if self._bar is not None:
            self._bar.set_postfix_str(self._text, refresh=False)
            self._bar.update(steps)
        elif self._done != self._total and time.monotonic() - self._printed >= _LINE_SECONDS:
            self._line()  # the end has its own

    def _line(self) -> None:
        self._printed = time.monotonic()
        if not _shown:
            return
        meter = tqdm.format_meter(
            self._done,
            self._total,
            self._printed - self._start,
            ncols=0,
            prefix=self._label,
            unit=self._unit,
            unit_scale=True,
            initial=self._first,
            postfix=self._text or None,
        )
        print(meter, file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bar is not None:
            self._bars.remove(self._bar)
            self._bar.close()
            for outer in self._bars[-1:]:
                outer.refresh()
        elif kind is None:
            self._line()
