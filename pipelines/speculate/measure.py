"""Prompts are answered by the target alone and with drafts, and both are counted.

What is accepted of a draft are those of its tokens that the answer got. The acceptance length is 1 + accepted
/ drafts, the target's own token counted. The first token of an answer, which its prompt gives, is no draft's.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.decoding.answering import Answer, Answering
from pipelines.decoding.engine import Engine
from pipelines.speculate.prompts import Prompt

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # where a new class of contexts begins


@dataclass(eq=False)
class _Turn(Answer):
    """`number`: of its prompt."""

    number: int = 0


@dataclass
class Figures:
    """Sums, which add up. `accepted` [K] is by position in the draft; `by_context` [classes, 2] counts drafts
    and what of them was accepted."""

    steps: int
    prompts: int = 0
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drafts: int = 0
    accepted: np.ndarray = field(init=False)
    by_context: np.ndarray = field(init=False)
    plain_tokens: int = 0
    plain_seconds: float = 0.0
    compared: int = 0
    identical: int = 0

    def __post_init__(self) -> None:
        self.accepted = np.zeros(self.steps, np.int64)
        self.by_context = np.zeros((len(CONTEXTS) + 1, 2), np.int64)

    def __add__(self, other: "Figures") -> "Figures":
        total = Figures(self.steps)
        for name in vars(total):
            if name != "steps":
                setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def count(self, answer: Answer) -> None:
        """One answer with drafts."""
        self.answers += 1
        self.tokens += answer.given
        self.drafts += len(answer.steps)
        for context, accepted in answer.steps:
            self.accepted[:accepted] += 1
            self.by_context[np.searchsorted(CONTEXTS, context, side="right")] += 1, accepted

    def summary(self) -> dict[str, Any]:
        """As a file has it; what was not measured is None."""
        timed = (self.tokens, self.seconds), (self.plain_tokens, self.plain_seconds)
        rate, plain = (tokens / seconds if seconds else None for tokens, seconds in timed)
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "tokens": self.tokens,
            "drafts": self.drafts,
            "acceptance_length": _length(self.drafts, self.accepted.sum()),
            "accepted": [float(n) / max(self.drafts, 1) for n in self.accepted],
            "tokens_per_s": rate,
            "plain_tokens_per_s": plain,
            "speedup": rate / plain if rate and plain else None,
            "compared": self.compared,
            "identical": self.identical,
            "by_context": {
                name: {"drafts": int(drafts), "acceptance_length": _length(drafts, accepted)}
                for name, (drafts, accepted) in zip(_context_names(), self.by_context, strict=True)
                if drafts
            },
        }


def _length(drafts: int, accepted: int) -> float | None:
    return 1 + float(accepted) / float(drafts) if drafts else None


def _context_names() -> list[str]:
    edges = (0, *CONTEXTS)
    return [f"{a}-{b - 1}" for a, b in zip(edges, CONTEXTS, strict=False)] + [f"{CONTEXTS[-1]}-"]


def answer(
    engine: Engine, stops: frozenset[int], prompts: list[Prompt], seed: int, tick: Callable[[int], None]
) -> tuple[list[list[Answer]], float]:
    """(the answers to each prompt, seconds that it took, without compiling). `tick` is told tokens."""
    answering, compiled, start = Answering(engine, stops), engine.compiling, time.monotonic()
    found: list[list[Answer]] = [[] for _ in prompts]
    waiting = deque(turn for number in range(len(prompts)) if (turn := _next(prompts, found, number, seed)))
    while waiting or answering.busy:
        ended = []
        while waiting and answering.free:
            turn = waiting.popleft()
            ended += [turn] if answering.begin(turn) else []
        if answering.busy:
            ended += answering.step()
        for turn in ended:
            found[turn.number].append(turn)
            tick(turn.given)
            if following := _next(prompts, found, turn.number, seed):
                waiting.append(following)
    return found, time.monotonic() - start - (engine.compiling - compiled)


def _next(prompts: list[Prompt], found: list[list[Answer]], number: int, seed: int) -> _Turn | None:
    """The next answer that a prompt asks for."""
    asked = prompts[number].behind([answer.tokens for answer in found[number]])
    if asked is None:
        return None
    text = f"{seed}:{number}:{len(found[number])}".encode()
    own = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
    return _Turn(asked[0], own, asked[1], number=number)


def measure(
    drafting: Engine,
    plain: Engine | None,
    stops: frozenset[int],
    prompts: list[Prompt],
    steps: int,
    seed: int,
    comparable: bool,
    tick: Callable[[int], None],
) -> Figures:
    """The figures of some prompts. `comparable`: both engines ought to give the same answers."""
    figures = Figures(steps, prompts=len(prompts))
    alone: list[list[Answer]] = []
    if plain is not None:
        alone, figures.plain_seconds = answer(plain, stops, prompts, seed, tick)
        figures.plain_tokens = sum(one.given for of_prompt in alone for one in of_prompt)
    found, figures.seconds = answer(drafting, stops, prompts, seed, tick)
    for of_prompt in found:
        for one in of_prompt:
            figures.count(one)
    if comparable:
        figures.compared = len(alone)
        figures.identical = sum(map(_same, alone, found))
    return figures


def _same(some: list[Answer], others: list[Answer]) -> bool:
    return [(a.tokens, a.finish) for a in some] == [(b.tokens, b.finish) for b in others]
