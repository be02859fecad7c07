"""An assistant's turns are found in a rendered conversation by rendering it again with stand-ins.

No template is parsed: whatever it adds, trims or removes shows in the text it renders, and a place is
returned only when the text around it is accounted for, character by character.

1. Every text of the conversation (contents, reasoning, names of called tools) is replaced by a word of
   ordinary letters, and that is rendered. The pieces between the words are the template's own.
2. The real text must be these pieces with the texts between them, each as it is or trimmed. Where the
   template changes texts, the pieces alone must divide the real text in one way only.
3. Where both fail, because the template looks at what the user says, only the answers are replaced.

So a conversation is rendered at most three times, whatever the number of its turns.

What the model writes: the text behind the generation prompt, up to the token that closes the turn. Gpt-oss
writes the names of its channels, a reasoning model the opening tag unless the prompt ends with it. Empty
`<think></think>` tags that the template puts there by itself are the prompt's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]  # role, content; some have reasoning, calls, counted: see dump/clean.py
Span = tuple[int, int]  # characters [start, end)
Render = Callable[[Messages], str]

THINK, END_THINK = "<think>", "</think>"
_WORD = re.compile(r"Qzx[a-j]+xzQ")
_OPENED = re.compile(rf"{THINK}\s*$")
_EMPTY_THOUGHT = re.compile(rf"(\s*({THINK})?\s*{END_THINK}\s*)?")


class Slot(NamedTuple):
    """A text of message `turn`: its content, its reasoning or the name of a call."""

    turn: int
    kind: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What the model writes of message `turn`: characters [start, end), without the closing token.

    `reasoning`: its reasoning is in the text. `calls`: it calls tools, and `end` is inside the last call.
    """

    turn: int
    start: int
    end: int
    reasoning: bool
    calls: bool


def find_answers(messages: Messages, text: str, render: Render, prompt: str = "") -> list[Answer] | None:
    """Every assistant message of `text` = render(messages), in order; None if it is not certain.

    `prompt`: what the template writes for the model to go on from. ValueError if `render` raises it for the
    messages with stand-ins in both forms.
    """
    for only_answers in (False, True):
        replaced, slots = _stand_ins(messages, only_answers)
        try:
            shape = render(replaced)
        except ValueError:
            if only_answers:
                raise
            continue
        pieces, words = _WORD.split(shape), _WORD.findall(shape)
        if _complete(messages, slots, words):
            texts = [slots[word].text for word in words]
            spans = _walk(text, pieces, texts) or _divide(text, pieces)
            if spans is not None:
                return _answers(messages, text, slots, list(zip(words, spans, strict=True)), prompt)
    return None


def _stand_ins(messages: Messages, only_answers: bool) -> tuple[Messages, dict[str, Slot]]:
    slots: dict[str, Slot] = {}

    def word(turn: int, kind: str, text: str) -> str:
        name = f"Qzx{''.join('abcdefghij'[int(digit)] for digit in str(len(slots)))}xzQ"
        slots[name] = Slot(turn, kind, text)
        return name

    replaced = []
    for turn, message in enumerate(messages):
        if only_answers and message["role"] != "assistant":
            replaced.append(message)
            continue
        changed = {
            kind: word(turn, kind, message[kind])
            for kind in ("reasoning", "content")
            if message.get(kind, "").strip()
        }
        if message.get("calls"):
            changed["calls"] = [
                call | {"name": word(turn, "call", call["name"])} for call in message["calls"]
            ]
        replaced.append(message | changed)
    return replaced, slots


def _complete(messages: Messages, slots: dict[str, Slot], words: list[str]) -> bool:
    """True if the answers show, each once and in order; reasoning, and text beside calls, may be removed.

    The name of a call may come again: gpt-oss writes it in front of the tool's result.
    """
    if not all(word in slots for word in words):
        return False
    answers = {word: slot for word, slot in slots.items() if messages[slot.turn]["role"] == "assistant"}
    times = Counter(words)
    for word, slot in answers.items():
        may_go = slot.kind == "reasoning" or (slot.kind == "content" and messages[slot.turn].get("calls"))
        count = times[word] if slot.kind != "call" else min(times[word], 1)
        if count != 1 and not (count == 0 and may_go):
            return False
    turns = [answers[word].turn for word in words if word in answers]
    shown = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    return turns == sorted(turns) and shown == set(turns)


def _candidates(text: str) -> Iterator[str]:
    yield from (text, text.strip(), text.rstrip(), text.lstrip(), text.lstrip("\n"), text.strip("\n"))


def _walk(text: str, pieces: list[str], contents: list[str]) -> list[Span] | None:
    """Spans such that `text` is the pieces with one candidate of each content between them."""
    if not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for number, (content, piece) in enumerate(zip(contents, pieces[1:], strict=True), 1):
        last = number == len(contents)
        for candidate in _candidates(content):
            end = at + len(candidate)
            follows = end + len(piece) == len(text) if last else True
            if follows and text.startswith(piece, end) and text.startswith(candidate, at):
                break
        else:
            return None
        spans.append((at, end))
        at = end + len(piece)
    return spans if spans or at == len(text) else None


def _divide(text: str, pieces: list[str]) -> list[Span] | None:
    """The spans between the pieces, if taking each piece as early as it fits and as late is the same."""
    first, *inner, last = pieces
    end = len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last) or end < len(first) or not all(inner):
        return None
    early, at = [len(first)], len(first)
    for piece in inner:
        at = text.find(piece, at, end)
        if at < 0:
            return None
        early += [at, at + len(piece)]
        at += len(piece)
    late, at = [end], end
    for piece in reversed(inner):
        at = text.rfind(piece, len(first), at)
        if at < 0:
            return None
        late += [at + len(piece), at]
    early.append(end)
    late.append(len(first))
    return list(zip(early[::2], early[1::2], strict=True)) if early == late[::-1] else None


def _answers(
    messages: Messages, text: str, slots: dict[str, Slot], found: list[tuple[str, Span]], prompt: str
) -> list[Answer]:
    answers: dict[int, Answer] = {}
    seen: set[str] = set()
    before = 0  # where the text in front of the header ends
    for word, (start, end) in found:
        turn, kind, _ = slots[word]
        message = messages[turn]
        if message["role"] == "assistant" and word not in seen:
            thinks, calls = kind == "reasoning", bool(message.get("calls"))
            if turn in answers:
                old = answers[turn]
                start, thinks = old.start, thinks or old.reasoning
            else:
                said = messages[turn - 1]["content"].strip() if turn else ""
                start -= _written(text[before:start], prompt, said)
            answers[turn] = Answer(turn, start, end, thinks, calls)
        seen.add(word)
        before = end
    return list(answers.values())


def _written(header: str, prompt: str, said: str) -> int:
    """How many characters at the end of `header` the model writes; `said`, the message before, is none."""
    for ending in (prompt, _OPENED.sub("", prompt)):
        at = header.rfind(ending) if ending.strip() else -1
        if at >= 0:
            rest = header[at + len(ending) :]
            prompts = _EMPTY_THOUGHT.fullmatch(rest) or (len(said) > 2 and said in rest)
            return 0 if prompts else len(rest)
    return 0
