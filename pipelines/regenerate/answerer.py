"""Who answers: the protocol of whatever turns messages into the target's answer, and what may come of it."""

from dataclasses import dataclass
from typing import Any, Protocol

Messages = list[dict[str, Any]]

# What an answer may be; all but the first end their conversation.
WHOLE = "whole"
CALLED = "called"  # it calls a tool, which nobody runs
TRUNCATED = "truncated"  # it has more tokens than it may have
REFUSED = "refused"  # held back by a filter, or a refusal that the server marks
EMPTY = "empty"  # nothing but white space, or reasoning alone
UNREADABLE = "unreadable"  # it calls a tool by something that is no JSON


@dataclass(frozen=True)
class Answer:
    """`message`: as it is recorded, with its `finish_reason`; `kind`: one of the above; `tokens` generated,
    0 where that is not known."""

    message: dict[str, Any]
    kind: str
    tokens: int = 0


class Answerer(Protocol):
    """`width`: questions that it takes at once; `name`: for messages."""

    name: str
    width: int

    async def ready(self) -> None:
        """Waits until it takes a question. GoneError if it will not take any more."""

    async def answer(self, messages: Messages, tools: list[dict[str, Any]], seed: int) -> Answer:
        """The answer to messages of role and content. TryAgainError, RejectedError or GoneError."""


class TryAgainError(Exception):
    """There is no answer this time. `alone`: meanwhile others were answered."""

    def __init__(self, reason: str, alone: bool) -> None:
        super().__init__(reason)
        self.alone = alone


class RejectedError(Exception):
    """These messages cannot be answered: they are too long, say."""


class GoneError(Exception):
    """Nothing will be answered any more. `mistake`: something given is wrong, which waiting does not mend."""

    def __init__(self, reason: str, mistake: bool) -> None:
        super().__init__(reason)
        self.mistake = mistake
