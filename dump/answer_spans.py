"""An assistant's answers are found in a rendered conversation by rendering it again with stand-ins.

No template is parsed: whatever it adds, trims or removes shows in the text it renders, and a span is
returned only when the text around it is accounted for, character by character.

1. Every answer is replaced by a word of ordinary letters and rendered. The pieces between the words are
   the template's own; the real text must be these pieces with the answers between them, each as it is,
   trimmed, or without the reasoning in front of `</think>` (which Qwen3 and DeepSeek-R1 take out of
   earlier turns).
2. Where that fails, one answer at a time is replaced. The text before and after the stand-in must frame
   the real text; what is inside is what the template made of the answer. The one thing that may differ
   in front is reasoning that the template sets into tags of its own.

What is answer: the text the model would have to write behind the generation prompt. Reasoning that the
real text keeps is answer, its opening tag included unless the generation prompt already ends with it. An
empty `<think></think>` that the template puts there by itself is prompt.
"""

import re
from collections.abc import Callable, Iterator

Messages = list[dict[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}
Span = tuple[int, int]  # characters [start, end)

THINK, END_THINK = "<think>", "</think>"


def answer_spans(
    messages: Messages, text: str, render: Callable[[Messages], str], opened: bool = False
) -> list[Span] | None:
    """Where each assistant message stands in `text` = render(messages), in order; None if it is not certain.

    `opened`: the generation prompt ends with the opening tag of the reasoning.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    words = {turn: _stand_in(number) for number, turn in enumerate(turns)}
    pieces = _split(render(_replaced(messages, words)), list(words.values()))
    if pieces is not None:
        spans = _walk(text, pieces, [messages[turn]["content"] for turn in turns])
        if spans is not None:
            return spans
    probed = []
    for turn in turns:
        pieces = _split(render(_replaced(messages, {turn: _stand_in(0)})), [_stand_in(0)])
        span = None if pieces is None else _framed(text, *pieces, messages[turn]["content"], opened)
        if span is None or (probed and span[0] < probed[-1][1]):
            return None
        probed.append(span)
    return probed


def _stand_in(number: int) -> str:
    letters = "".join("abcdefghij"[int(digit)] for digit in str(number))
    return f"Qzx{letters}xzQ"


def _replaced(messages: Messages, words: dict[int, str]) -> Messages:
    return [m | {"content": words[i]} if i in words else m for i, m in enumerate(messages)]


def _split(text: str, words: list[str]) -> list[str] | None:
    """The pieces around `words`; None unless each occurs once and in order."""
    pieces = []
    for word in words:
        if text.count(word) != 1:
            return None
        piece, _, text = text.partition(word)
        pieces.append(piece)
    return [*pieces, text]


def _candidates(content: str) -> Iterator[str]:
    for part in (content, content.rpartition(END_THINK)[2]):
        yield from (part, part.strip(), part.rstrip(), part.lstrip(), part.lstrip("\n"), part.strip("\n"))


def _walk(text: str, pieces: list[str], contents: list[str]) -> list[Span] | None:
    """Spans such that `text` is the pieces with one candidate of each content between them."""
    if not text.startswith(pieces[0]):
        return None
    at, spans = len(pieces[0]), []
    for content, piece in zip(contents, pieces[1:], strict=True):
        last = len(spans) == len(contents) - 1
        for candidate in _candidates(content):
            end = at + len(candidate)
            follows = text[end:] == piece if last else text.startswith(piece, end)
            if text.startswith(candidate, at) and follows:
                break
        else:
            return None
        spans.append((at, end))
        at = end + len(piece)
    return spans


def _framed(text: str, before: str, after: str, content: str, opened: bool) -> Span | None:
    """The span between `before` and `after`, or the one of reasoning and answer where only `after` fits."""
    end = len(text) - len(after)
    if end < 0 or not text.endswith(after):
        return None
    if len(before) <= end and text.startswith(before):
        return len(before), end
    reasoning, tag, answer = content.rpartition(END_THINK)
    reasoning = reasoning.rpartition(THINK)[2].strip()
    if not tag or not reasoning:
        return None
    tail = rf"({THINK}\s*)?{re.escape(reasoning)}\s*{END_THINK}\s*{re.escape(answer.strip())}\s*\Z"
    found = re.search(tail, text[:end])
    if found is None or not before.startswith(text[: found.start()]):
        return None
    return (found.end(1) if opened and found[1] else found.start()), end
