"""A conversation is asked question by question, each behind the answers that came before."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from pipelines.regenerate.answerer import TRUNCATED, WHOLE, Answerer, Messages, RejectedError

ANSWERED = "answered"  # all of its questions
REJECTED = "rejected"


@dataclass
class Talk:
    """The `number`-th conversation. `left`: its system turn and questions that are not answered yet;
    `messages`: what was said, as it is recorded; `digest` is of all questions.

    `failures`: how often it was not answered while others were; `reason`: why, at last.
    """

    number: int
    id: str
    left: Messages
    tools: list[dict[str, Any]]
    digest: bytes
    messages: Messages = field(default_factory=list)
    tokens: int = 0
    failures: int = 0
    reason: str = ""

    def record(self, outcome: str) -> dict[str, Any]:
        """Its line in the file of answers."""
        named = {"id": self.id, "number": self.number, "outcome": outcome, "tokens": self.tokens}
        if outcome == REJECTED:
            named["reason"] = self.reason
        return named | {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


async def converse(talk: Talk, answerer: Answerer, seed: int, keep_truncated: bool) -> str:
    """Asks what is left; returns the outcome: `answered`, `rejected` or the kind of the answer that ends it.

    `answerer` is ready for the first one. What it raises passes, and the next call goes on from there.
    """
    is_ready = True
    while talk.left:
        if not is_ready:
            await answerer.ready()
        is_ready = False
        asked = 1 + next(i for i, message in enumerate(talk.left) if message["role"] == "user")
        question, rest = talk.left[:asked], talk.left[asked:]
        messages = [{"role": m["role"], "content": m["content"]} for m in [*talk.messages, *question]]
        try:
            answer = await answerer.answer(messages, talk.tools, seed_of(talk, seed))
        except RejectedError as error:
            talk.messages, talk.reason = [*talk.messages, *question], str(error)
            return REJECTED
        talk.messages, talk.left = [*talk.messages, *question], rest
        talk.tokens += answer.tokens
        if not _is_kept(answer.kind, keep_truncated):
            return answer.kind
        talk.messages.append(answer.message)
        if answer.kind != WHOLE:
            return answer.kind
    return ANSWERED


def seed_of(talk: Talk, seed: int) -> int:
    """31 bits: a function of the conversation's questions, of which one it is, and of `seed`."""
    text = f"{seed}:{len(talk.messages)}:".encode() + talk.digest
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def _is_kept(kind: str, keep_truncated: bool) -> bool:
    return kind in (WHOLE, "called") or (kind == TRUNCATED and keep_truncated)
