"""How often a run is measured and saved: both together cost a twentieth of it at most, however long it is.

Evaluations follow from the length of a run alone, because the best head depends on them. When a state is
saved changes nothing of a run, so that is decided by what it costs here.
"""

import math
import time

from common import pod

_SHARE = 0.06  # rows that are evaluated, of those that are trained on: one costs a third of a training row
_MOST = 20  # evaluations
_FEW, _ENOUGH = 2**13, 2**20  # positions of one: fewer do not tell the better head, more tell nothing new
_EXPORTS, _EXPORTED = 4, 2**20  # where nothing can be measured: at most, and trained positions for each
_RATE = 0.5e9  # bytes a second, until a save was timed
_TIMES = 40  # how much longer than a save the time between two is
_LOOK = 8  # steps after which it is known how long one takes


def evaluations(steps: int, batch_rows: int, length: int, held_out: int) -> tuple[int, int]:
    """(steps between two evaluations, held-out rows of one): the same rows each time, whole batches or all.

    Where the held-out rows are many for so short a run, a part of them is measured; `eyas eval` takes all. A
    very short run is measured once, at its end. Without held-out rows heads are only exported.
    """
    if not held_out:
        return -(-steps // min(_EXPORTS, max(1, steps * batch_rows * length // _EXPORTED))), 0
    budget = int(_SHARE * steps * batch_rows)
    times = min(_MOST, max(1, budget * length // _FEW))
    wanted = min(budget // times, _ENOUGH // length)
    rows = min(held_out, max(1, wanted // batch_rows) * batch_rows)
    return -(-steps // min(_MOST, max(1, budget // rows))), rows


class Saving:
    """After which steps a state is saved, and what a save costs."""

    def __init__(self, nbytes: int, every: int | None = None, first: int = 0):
        """Of a state of so many bytes, in a process that goes on after step `first`. `every` so many steps;
        None: as often as the cost allows, once it is known how long a step takes."""
        self._seconds = nbytes / _RATE
        self._since: float | None = None
        self._every, self._first = every, first
        self._next: float = math.inf
        self._stepping = 0.0  # when this process's first step was done

    def stepped(self, step: int) -> None:
        """A step is done."""
        if step == self._first + 1:
            self._stepping = time.monotonic()
        if step == self._first + _LOOK:
            self.plan(step)

    def plan(self, step: int) -> None:
        """Decides, for all processes, after which step the next one is due."""
        if self._every is None and step > self._first + 1:
            seconds = (time.monotonic() - self._stepping) / (step - self._first - 1)
            self._next = step + pod.told(lambda: self.steps(seconds))

    def is_due(self, step: int) -> bool:
        """Whether the state of this step is to be saved."""
        return step >= self._next if self._every is None else step % self._every == 0

    def begin(self) -> None:
        """A save begins."""
        self._since = time.monotonic()

    def end(self) -> None:
        """What was saved is on disk."""
        if self._since is not None:
            self._seconds, self._since = time.monotonic() - self._since, None

    def steps(self, seconds: float) -> int:
        """Until the next one, for steps of so many seconds."""
        return max(1, math.ceil(_TIMES * self._seconds / max(seconds, 1e-9)))
