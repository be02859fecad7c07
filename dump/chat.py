"""The target's own tokenizer and chat template turn a conversation into tokens and a mask of its answers.

`transformers` loads both: templates run in its sandbox, no remote code is run, torch is not needed. The mask
covers each answer and the special token that closes it (`<|im_end|>`, `<|eot_id|>`, `</s>`; not if the answer
was cut off), and nothing of the headers nor of what follows the closing token. A token that reaches into a
header is not counted, unless it reaches over spaces only (the tokenizer joins a header's last space to the
answer's first word).
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np

from common.errors import EyasError
from dump.answer_spans import END_THINK, THINK, Answer, Messages, Span, find_answers
from dump.dialect import Dialect
from dump.template import Template, TemplateRefusedError
from dump.tokenizer_files import load_tokenizer, stop_tokens, template_of, tokenizer_hash

# Closing tokens of a turn that calls tools, where they are others than an answer's: gpt-oss, Llama 3.
_ENDS_OF_CALLS = ("<|call|>", "<|eom_id|>")
_PLAIN_TALK = (
    ("user", "Which colour?"),
    ("assistant", "Blue."),
    ("user", "Why?"),
    ("assistant", "I like it."),
)


class TemplateNotFollowedError(ValueError):
    """The answers could not be located with certainty in what the template rendered."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its answers as character spans [start, end), closing tokens included.

    `removed`: turns whose reasoning the template leaves out.
    """

    text: str
    spans: tuple[Span, ...]
    removed: int = 0


@dataclass(frozen=True)
class Encoded:
    """A conversation as int32 [n] tokens and a uint8 [n] mask, 1 where the token is counted."""

    tokens: np.ndarray
    mask: np.ndarray


class Chat:
    """The tokenizer and chat template of one model folder; made by `load`.

    `tokenizer_hash` is that of the folder, `template_hash` the sha256 of the template's text.
    `has_system` and `has_tools`: the template knows a system turn, and tools. `opens_thought`: what it writes
    for the model to go on from begins a thought. `stops`: the tokens that end an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        tokenizer_hash: str,
        where: str,
        stops: frozenset[int] = frozenset(),
    ):
        self.tokenizer_hash = tokenizer_hash
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # some tokenizer.json files cut at a length of their own
        self._backend.no_padding()
        added = tokenizer.added_tokens_decoder
        special = (t.content for t in added.values() if t.special)
        self._specials = tuple(sorted(special, key=len, reverse=True))
        alternatives = "|".join(map(re.escape, self._specials)) or "(?!)"
        self._special = re.compile(alternatives)
        self._closing = re.compile(rf"[ \t]*(?:{alternatives})")
        self._template = Template(template, where)
        self._dialect = Dialect(self._template, tokenizer.special_tokens_map)
        self.has_system, self.has_tools = self._dialect.has_system, self._dialect.has_tools
        self.opens_thought = self._dialect.prompt.rstrip().endswith(THINK)
        self.stops = stops | {tokenizer.eos_token_id} - {None}
        self._stop = ""
        ends = {added[i].content for i in stops if i in added} | {tokenizer.eos_token, *_ENDS_OF_CALLS}
        self._try_out(where, ends & set(self._specials))

    @classmethod
    def load(cls, folder: str) -> Self:
        """Reads the tokenizer of a model folder (local, or a URL, whose small files are copied).

        EyasError if there is no tokenizer, it needs code of the folder's own, it cannot report offsets, or
        there is no chat template that can be followed.
        """
        digest = tokenizer_hash(folder)
        tokenizer = load_tokenizer(folder)
        if not tokenizer.is_fast:
            raise EyasError(f"{folder} has a tokenizer without offsets; add its tokenizer.json")
        return cls(tokenizer, template_of(tokenizer, folder), digest, folder, stop_tokens(folder))

    def holds_special(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> bool:
        """True if a text spells a special token, which would be taken for the template's own."""
        texts = chain(*map(_texts, messages), (json.dumps(tool, ensure_ascii=False) for tool in tools or ()))
        return any(map(self._special.search, texts))

    def render(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> Rendered:
        """The conversation in the model's own format, without a generation prompt.

        A system turn that the template does not know stands in front of the first question. Where the
        template removes all reasoning but its generation prompt begins some, the last turn follows it.
        TemplateRefusedError or TemplateNotFollowedError if this conversation cannot be used.
        """
        messages, tools = self._dialect.fold_system(messages), tools or []
        text, marked = self._dialect.apply(messages, tools)
        if self._template.marks_answers:
            answers = _marked_answers(messages, text, [self._trimmed(text, *span) for span in marked])
        else:
            answers = find_answers(
                messages, text, lambda given: self._dialect.apply(given, tools)[0], self._dialect.prompt
            )
        if answers is None:
            raise TemplateNotFollowedError("an answer is not to be found in what the template rendered")
        removed = sum(bool(messages[a.turn].get("reasoning")) and not a.reasoning for a in answers)
        if removed and self._dialect.reasoning == "prompted":
            text, answers, restored = self._prompted(messages, tools, text, answers)
            removed -= restored
        text, spans = self._spans(text, answers, {i for i, m in enumerate(messages) if m.get("cut")})
        counted = [messages[a.turn].get("counted", True) for a in answers]
        return Rendered(text, tuple(s for s, c in zip(spans, counted, strict=True) if c), removed)

    def encode(self, rendered: list[Rendered]) -> list[Encoded]:
        """Tokens and masks; the template has written every special token, so none is added.

        EyasError for a token beyond 32 bits.
        """
        encodings = self._backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        try:
            return [
                Encoded(np.array(e.ids, np.int32), mask_of(r, e.offsets))
                for r, e in zip(rendered, encodings, strict=True)
            ]
        except OverflowError as error:
            raise EyasError(
                f"the tokenizer gives a token that is no 32-bit number ({error}); fetch the model again"
            ) from None

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens from which the model goes on to answer. TemplateRefusedError if the template raises."""
        text = self._dialect.apply(self._dialect.fold_system(messages), [], prompt=True)[0]
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int], special: bool = True) -> str:
        """The text of some tokens; with `special`, special ones included."""
        return self._backend.decode(tokens, skip_special_tokens=not special)

    def _prompted(
        self, messages: Messages, tools: list[dict[str, Any]], text: str, answers: list[Answer]
    ) -> tuple[str, list[Answer], bool]:
        """The text with the last turn's reasoning behind the generation prompt, as the model writes it."""
        last = answers[-1]
        thought = messages[last.turn].get("reasoning")
        if not thought or last.calls or last.turn != len(messages) - 1:
            return text, answers, False
        prompt = self._dialect.apply(messages[:-1], tools, prompt=True)[0]
        if not prompt.startswith(text[: last.start]):
            return text, answers, False
        written = f"{thought.strip()}\n{END_THINK}\n\n{text[last.start : last.end].lstrip()}"
        moved = Answer(last.turn, len(prompt), len(prompt) + len(written), True, False)
        return prompt + written + text[last.end :], [*answers[:-1], moved], True

    def _spans(self, text: str, answers: list[Answer], cut: set[int]) -> tuple[str, list[Span]]:
        """The answers with their closing tokens; a last one that the template leaves open gets its token.

        What closes the turns `cut` is the template's, not the model's.
        """
        spans = []
        for number, answer in enumerate(answers):
            last = number == len(answers) - 1
            limit = len(text) if last else answers[number + 1].start
            end = self._end_of_calls(text, answer.end, limit, last) if answer.calls else answer.end
            closed = self._unclosed if answer.turn in cut else self._closed
            spans.append(closed(text, answer.start, end))
        is_whole = spans and answers[-1].turn not in cut
        if self._stop and is_whole and not text[spans[-1][1] :].strip():
            start, end = spans[-1]
            if not text.endswith(self._specials, start, end):
                text, spans[-1] = text[:end] + self._stop, (start, end + len(self._stop))
        return text, spans

    def _end_of_calls(self, text: str, start: int, limit: int, last: bool) -> int:
        """Where the turn ends whose last call's name ends at `start`: before its closing token."""
        found = self._ends.search(text, start, limit)
        if found is None and not last:
            raise TemplateNotFollowedError("a call of a tool is not closed in what the template rendered")
        return found.start() if found else len(text[:limit].rstrip())

    def _try_out(self, where: str, ends: set[str]) -> None:
        """EyasError unless a plain conversation can be rendered and followed; finds what closes turns."""
        talk = [{"role": role, "content": text} for role, text in _PLAIN_TALK]
        try:
            rendered = self.render(talk)
        except (TemplateRefusedError, TemplateNotFollowedError) as error:
            raise EyasError(f"the chat template of {where} fails on a plain conversation: {error}") from None
        if len(rendered.spans) != 2:
            raise EyasError(
                f"the chat template of {where} does not mark both answers of a plain conversation"
            )
        closings = [self._special.findall(rendered.text[start:end])[-1:] for start, end in rendered.spans]
        self._ends = re.compile("|".join(map(re.escape, ends.union(*closings))) or "(?!)")
        if closings[0] and not closings[1]:
            self._stop = closings[0][0]  # GLM's templates close a turn by the next one's header

    def _closed(self, text: str, start: int, end: int) -> Span:
        if text.endswith(self._specials, start, end):
            return start, end
        closing = self._closing.match(text, end)
        return start, closing.end() if closing else end

    def _unclosed(self, text: str, start: int, end: int) -> Span:
        closing = next((s for s in self._specials if text.endswith(s, start, end)), "")
        return start, end - len(closing)

    def _trimmed(self, text: str, start: int, end: int) -> Span:
        """A template's own span, without the white space that it may have behind the closing token."""
        stripped = start + len(text[start:end].rstrip())
        return (start, stripped) if text.endswith(self._specials, start, stripped) else (start, end)


def _texts(message: dict[str, Any]) -> Iterator[str]:
    yield from (message[name] for name in ("content", "reasoning", "name") if message.get(name))
    for call in message.get("calls", ()):
        yield json.dumps(call, ensure_ascii=False)


def _marked_answers(messages: Messages, text: str, spans: list[Span]) -> list[Answer] | None:
    """The answers as the template marks them, if it marks one an assistant message."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) != len(spans):
        return None
    thoughts = [messages[turn].get("reasoning", "").strip() for turn in turns]
    return [
        Answer(turn, start, end, thought in text[start:end], calls=False)
        for turn, thought, (start, end) in zip(turns, thoughts, spans, strict=True)
    ]


def mask_of(rendered: Rendered, offsets: list[tuple[int, int]]) -> np.ndarray:
    """uint8 [n]: 1 for the tokens, given by their character offsets, that lie in a span.

    Byte-level tokenizers may leave leading spaces out of a token's offsets, so that a token of spaces is
    empty; it is counted by its end.
    """
    mask = np.zeros(len(offsets), np.uint8)
    if not offsets:
        return mask
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    for start, end in rendered.spans:
        first, last = np.searchsorted(ends, (start, end), side="right")
        while first < last and rendered.text[starts[first] : start].strip(" "):
            first += 1
        mask[first:last] = 1
    return mask
