"""Answers that grow in an engine's slots, each until it ends by itself or has no more room."""

from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.decoding.engine import Engine

STOP, LENGTH = "stop", "length"  # why an answer ended


class Step(NamedTuple):
    """What a step of the engine gave an answer: behind how many tokens, and how many of its drafts."""

    context: int
    accepted: int


@dataclass(eq=False)
class Answer:
    """Of at most `room` tokens. `finish`: why it ended, if it has; `tokens` have no stop token."""

    prompt: list[int]
    seed: int
    room: int
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    steps: list[Step] = field(default_factory=list)

    @property
    def given(self) -> int:
        """Tokens that the target gave, the stop token among them."""
        return len(self.tokens) + (self.finish == STOP)


class Answering:
    """`engine` answers; `stops` end an answer."""

    def __init__(self, engine: Engine, stops: frozenset[int]):
        self._engine, self._stops = engine, stops
        self._active: dict[int, Answer] = {}

    @property
    def free(self) -> int:
        """How many answers can begin now."""
        return self._engine.free

    @property
    def busy(self) -> bool:
        """Whether an answer grows."""
        return bool(self._active)

    def begin(self, answer: Answer) -> bool:
        """Gives it a slot, which must be free, and its first token; True if it has ended already."""
        slot, token = self._engine.begin(answer.prompt, answer.seed)
        self._active[slot] = answer
        return self._take(slot, [token])

    def step(self) -> list[Answer]:
        """All answers grow; returns those that have ended."""
        tokens, counts = self._engine.step()
        ended = []
        for slot, answer in list(self._active.items()):
            before, count = answer.given, int(counts[slot])
            done = self._take(slot, tokens[slot, :count].tolist())
            context = len(answer.prompt) + before
            answer.steps.append(Step(context, min(answer.given - before, count - 1)))
            ended += [answer] if done else []
        return ended

    def _take(self, slot: int, tokens: list[int]) -> bool:
        answer = self._active[slot]
        for token in tokens:
            if token in self._stops:
                answer.finish = STOP
            else:
                answer.tokens.append(token)
                answer.finish = LENGTH if len(answer.tokens) == answer.room else ""
            if answer.finish:
                self._engine.end(slot)
                del self._active[slot]
                return True
        return False
