"""Prompt sets: what the target is asked, by category.

A file's records are read as `--data` reads them; of those with a `category`, or without any answers, lists of
strings under `turns` or `prompt` are the user's turns one after another. So these layouts are read:

- MT-Bench, Spec-Bench, and what EAGLE derives from others: `question_id`, `category`, `turns`.
- SPEED-Bench (arXiv 2604.09557): the same, with `sub_category` and others. Rows that the publisher left to be
  fetched from elsewhere are left out.
- GSM8K: `question` and `answer`, of which the first is asked.
- HumanEval: `task_id`, `prompt` and others, of which the prompt is asked.
- Conversations (dump/record_shapes.py): the user's turns, each answered anew.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from common.errors import EyasError
from common.progress import Progress
from common.store import Store
from common.texts import printable
from dump.chat import Chat
from dump.clean import Cleaner, repaired
from dump.conversations import DataFile
from dump.data_files import find_files, name_of
from dump.record_shapes import EXPECTED
from dump.template import TemplateRefusedError

ALL = ""  # the category of a set that has none
_UNRESOLVED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
_LISTS = ("turns", "prompt")


class Prompt(Protocol):
    """One or more questions of a category, each behind the answers to those before."""

    category: str

    def behind(self, answers: list[list[int]]) -> tuple[list[int], int] | None:
        """(the tokens to go on from, how many the answer may have) behind these answers; None: no more."""
        ...


@dataclass(frozen=True)
class Asked:
    """Questions, each a user's turn, the first one perhaps behind a system turn."""

    category: str
    turns: tuple[tuple[dict[str, Any], ...], ...]
    chat: Chat
    room: int
    length: int

    def behind(self, answers: list[list[int]]) -> tuple[list[int], int] | None:
        """See Prompt."""
        if len(answers) == len(self.turns):
            return None
        messages = list(self.turns[0])
        for turn, answer in zip(self.turns[1:], answers, strict=False):
            said = {"role": "assistant", "content": self.chat.decode(answer, special=False)}
            messages += [said, *turn]
        try:
            tokens = self.chat.prompt(messages)
        except TemplateRefusedError:
            return None
        room = min(self.room, self.length - len(tokens))
        return (tokens, room) if room > 0 else None


@dataclass(frozen=True)
class Recorded:
    """A held-out answer: given anew behind what stands before it, in as many tokens at most."""

    category: str
    tokens: tuple[int, ...]
    room: int

    def behind(self, answers: list[list[int]]) -> tuple[list[int], int] | None:
        """See Prompt."""
        return None if answers else (list(self.tokens), self.room)


@dataclass(frozen=True)
class PromptSet:
    """`left_out`: how many, by reason."""

    name: str
    prompts: list[Prompt]
    left_out: dict[str, int]

    def categories(self) -> dict[str, list[Prompt]]:
        """The prompts of each category, in the order in which they were met."""
        found: dict[str, list[Prompt]] = {}
        for prompt in self.prompts:
            found.setdefault(prompt.category, []).append(prompt)
        return found


def of_file(path: str, chat: Chat, room: int, length: int, each: int | None) -> PromptSet:
    """The questions of a file, or of a folder of them: the first `each` of a category.

    EyasError if it cannot be read, or asks nothing.
    """
    prompts, left_out, taken = [], Counter[str](), Counter[str]()
    cleaner = Cleaner(questions=True)
    for category, turns in _questions(path, cleaner, left_out):
        asked = Asked(category, turns, chat, room, length)
        if each is not None and taken[category] == each:
            continue
        if why := _unusable(asked):
            left_out[why] += 1
            continue
        taken[category] += 1
        prompts.append(asked)
    left_out.update({name: n for name, n in cleaner.counts.items() if name.startswith("dropped_") and n})
    if not prompts:
        reasons = ", ".join(f"{n} {name}" for name, n in left_out.items()) or "no records"
        raise EyasError(
            f"{path} asks nothing ({reasons}); expected {EXPECTED}, or a list of strings under turns"
        )
    name = printable(os.path.splitext(name_of(path.rstrip("/")))[0])
    return PromptSet(name, prompts, dict(left_out))


def _questions(path: str, cleaner: Cleaner, left_out: Counter[str]) -> Iterator[tuple[str, tuple]]:
    """(category, turns) of every record that asks something."""
    for url in find_files((path,)):
        file = DataFile.open(url)
        with Progress(f"read {file.name}", file.bytes, "B") as bar:
            for number, record in enumerate(file.records(bar.update)):
                fields = record if isinstance(record, dict) else {}
                texts = next((fields[key] for key in _LISTS if _is_texts(fields.get(key))), None)
                category = printable(fields["category"]) if isinstance(fields.get("category"), str) else ALL
                if texts is not None and any(_UNRESOLVED in text for text in texts):
                    left_out["unresolved"] += 1
                elif texts is not None and ("category" in fields or "question_id" in fields):
                    yield category, tuple(({"role": "user", "content": repaired(text)},) for text in texts)
                elif conversation := cleaner.clean(record, number, file.name):
                    if conversation.tools:
                        left_out["with_tools"] += 1
                    else:
                        yield category, _turns(conversation.messages)
        file.require_json()
        file.require_same()


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _turns(messages: Iterable[dict[str, Any]]) -> tuple[tuple[dict[str, Any], ...], ...]:
    """A system turn belongs to the first question."""
    turns: list[tuple[dict[str, Any], ...]] = []
    before: tuple[dict[str, Any], ...] = ()
    for message in messages:
        before += ({"role": message["role"], "content": message["content"]},)
        if message["role"] == "user":
            turns, before = [*turns, before], ()
    return tuple(turns)


def _unusable(asked: Asked) -> str:
    """Why the first question cannot be asked; empty if it can."""
    if asked.chat.holds_special([message for turn in asked.turns for message in turn]):
        return "spells_a_special_token"
    return "" if asked.behind([]) else "too_long_or_refused_by_the_template"


def of_store(store: Store, rows: np.ndarray, room: int, length: int) -> PromptSet:
    """The answers of these rows, each behind its own document up to it, in their order."""
    columns = store.read(("tokens", "segment_ids", "loss_mask"), rows)
    prompts, left_out = [], Counter[str]()
    for tokens, segments, mask in zip(*columns.values(), strict=True):
        for begin, start, end in _answers(segments, mask):
            if start == begin:
                left_out["without_a_prompt"] += 1
            elif start - begin >= length:
                left_out["too_long"] += 1
            else:
                most = min(room, end - start, length - (start - begin))
                prompts.append(Recorded(ALL, tuple(tokens[begin:start].tolist()), most))
    if not prompts:
        raise EyasError(f"{store.url}: its held-out rows have no answer behind a prompt; hold out more")
    return PromptSet("held out", prompts, dict(left_out))


def _answers(segments_T: np.ndarray, mask_T: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(where its document begins, its first token, behind its last one) of each answer of a row."""
    T = len(segments_T)
    new_document = np.concatenate([[True], segments_T[1:] != segments_T[:-1]])
    masked = mask_T > 0
    starts = np.flatnonzero(masked & (new_document | ~np.concatenate([[False], masked[:-1]])))
    for start in starts:
        begin = int(np.flatnonzero(new_document[: start + 1])[-1])
        inside = masked[start:] & (segments_T[start:] == segments_T[start])
        end = T if inside.all() else int(start + np.argmin(inside))
        yield begin, int(start), end
