"""Who is free takes the next conversation; one that was not answered goes back to the others."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from common.progress import note
from pipelines.regenerate.answerer import Answerer, GoneError, TryAgainError
from pipelines.regenerate.talk import Talk, converse

_TRIES = 6  # of one conversation, while others are answered
_WAITING = 256  # conversations that may wait to be asked again, before more are begun
_TICK = 0.2  # seconds between two looks at the whole


class Work:
    """Asks `talks` of all answerers; `done(talk, outcome)` is called once for each that has an outcome.

    `unanswered`: those that failed again and again; `gone`: why an answerer ended before the work did, by
    its name.
    """

    def __init__(
        self, talks: Iterable[Talk], done: Callable[[Talk, str], None], seed: int, keep_truncated: bool
    ) -> None:
        self._fresh: Iterator[Talk] = iter(talks)
        self._ahead = next(self._fresh, None)  # the first of those that nobody has taken
        self._again: deque[Talk] = deque()
        self._taken = 0
        self._changed = asyncio.Event()
        self._done, self._seed, self._keep_truncated = done, seed, keep_truncated
        self.unanswered: list[Talk] = []
        self.gone: dict[str, GoneError] = {}

    async def run(self, answerers: list[Answerer], tick: Callable[[], None]) -> None:
        """Ends when nothing is left, or nobody who answers. `tick` is called now and then, and may raise."""
        tasks = {asyncio.ensure_future(self._ask(a)) for a in answerers for _ in range(a.width)}
        try:
            while tasks:
                ended, tasks = await asyncio.wait(tasks, timeout=_TICK, return_when=asyncio.FIRST_EXCEPTION)
                for task in ended:
                    task.result()
                tick()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, answerer: Answerer) -> None:
        while answerer.name not in self.gone and await self._some_left():
            try:
                await answerer.ready()
            except GoneError as error:
                return self._note_gone(answerer.name, error)
            talk = self._next()
            if talk:
                self._give_back(await self._answered(talk, answerer))

    async def _answered(self, talk: Talk, answerer: Answerer) -> Talk | None:
        """None if it is done with, else the conversation, which is to be asked again."""
        try:
            outcome = await converse(talk, answerer, self._seed, self._keep_truncated)
        except GoneError as error:
            self._note_gone(answerer.name, error)
            return talk
        except TryAgainError as error:
            talk.failures += error.alone
            talk.reason = str(error)
            if talk.failures < _TRIES:
                return talk
            self.unanswered.append(talk)
            return None
        self._done(talk, outcome)
        return None

    async def _some_left(self) -> bool:
        """Waits while all that is left is being asked, since some of it may come back."""
        while not self._again and self._ahead is None:
            if not self._taken:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    def _next(self) -> Talk | None:
        """The next conversation, None if others took what was left."""
        if self._ahead is not None and len(self._again) < _WAITING:
            talk, self._ahead = self._ahead, next(self._fresh, None)
        else:
            talk = self._again.popleft() if self._again else None
        self._taken += talk is not None
        return talk

    def _give_back(self, talk: Talk | None) -> None:
        """`talk` None: it is done with."""
        if talk:
            self._again.append(talk)
        self._taken -= 1
        self._changed.set()

    def _note_gone(self, name: str, error: GoneError) -> None:
        if name not in self.gone:
            self.gone[name] = error
            note(f"{name} is given up: {error}")
