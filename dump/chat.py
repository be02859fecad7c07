"""The target's own tokenizer and chat template turn a conversation into tokens and a mask of its answers.

`transformers` loads both: templates run in its sandbox, no remote code is run, torch is not needed. The mask
covers each answer and the special token that closes it (`<|im_end|>`, `<|eot_id|>`, `</s>`), and nothing of
the headers nor of what follows the closing token. A token that reaches into a header is not counted, unless
it reaches over spaces only (the tokenizer joins a header's last space to the answer's first word).
"""

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import jinja2
import numpy as np

from common import storage
from common.errors import EyasError
from dump.answer_spans import THINK, Messages, Span, answer_spans

# Templates that print today's date would give other bytes tomorrow: they get the date that the published
# Llama 3 templates fall back to.
_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%A": "Friday", "%a": "Fri",
    "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


class TemplateRefusedError(ValueError):
    """The template raised for this conversation (no system role, say); str() is the template's message."""


class TemplateNotFollowedError(ValueError):
    """The answers could not be located with certainty in what the template rendered."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its answers as character spans [start, end), closing tokens included."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Encoded:
    """A conversation as int32 [n] tokens and a uint8 [n] mask, 1 where the token is counted."""

    tokens: np.ndarray
    mask: np.ndarray


def tokenizer_hash(folder: str) -> str:
    """sha256 (hex) of a model folder's tokenizer.json, or of the files it would be made from.

    EyasError if the folder or its tokenizer is missing.
    """
    if not storage.exists(folder):
        raise EyasError(f"the model folder {folder} does not exist; give a Hugging Face model folder")
    names = [name for name in _TOKENIZER_FILES if storage.exists(storage.join(folder, name))]
    if not names:
        raise EyasError(f"{folder} has no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}")
    digest = hashlib.sha256()
    for name in names[:1] if names[0] == "tokenizer.json" else names:
        digest.update(storage.read_bytes(storage.join(folder, name)))
    return digest.hexdigest()


class Chat:
    """The tokenizer and chat template of one model folder; made by `load`.

    `tokenizer_hash` is that of the folder, `template_hash` the sha256 of the template's text.
    """

    def __init__(self, tokenizer: Any, template: str, tokenizer_hash: str, where: str):
        self.tokenizer_hash = tokenizer_hash
        self.template_hash = hashlib.sha256(template.encode()).hexdigest()
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()  # some tokenizer.json files cut at a length of their own
        self._backend.no_padding()
        self._template = _with_fixed_date(template)
        self._marks_answers = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        self._variables = tokenizer.special_tokens_map
        special = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        self._specials = tuple(sorted(special, key=len, reverse=True))
        alternatives = "|".join(map(re.escape, self._specials)) or "(?!)"
        self._special = re.compile(alternatives)
        self._closing = re.compile(rf"[ \t]*(?:{alternatives})")
        self._opened = False
        self._try_out(where)

    @classmethod
    def load(cls, folder: str) -> Self:
        """Reads the tokenizer of a model folder (local, or a URL, whose small files are copied).

        EyasError if there is no tokenizer, it needs code of the folder's own, it cannot report offsets, or
        there is no chat template that can be followed.
        """
        digest = tokenizer_hash(folder)
        tokenizer = _load_tokenizer(folder)
        if not tokenizer.is_fast:
            raise EyasError(f"{folder} has a tokenizer without offsets; add its tokenizer.json")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise EyasError(
                f"{folder} has no chat template; add chat_template.jinja, or use the instruction-tuned model"
            ) from None
        return cls(tokenizer, template, digest, folder)

    def holds_special(self, messages: Messages) -> bool:
        """True if a message's text spells a special token, which would be taken for the template's own."""
        return any(self._special.search(message["content"]) for message in messages)

    def render(self, messages: Messages) -> Rendered:
        """The conversation in the model's own format, without a generation prompt.

        TemplateRefusedError or TemplateNotFollowedError if this conversation cannot be used.
        """
        text, marked = self._apply(messages)
        if self._marks_answers:
            spans = [self._trimmed(text, *span) for span in marked]
        else:
            spans = answer_spans(messages, text, lambda m: self._apply(m)[0], self._opened)
        if spans is None:
            raise TemplateNotFollowedError("an answer is not to be found in what the template rendered")
        return Rendered(text, tuple(self._closed(text, *span) for span in spans))

    def encode(self, rendered: list[Rendered]) -> list[Encoded]:
        """Tokens and masks; the template has written every special token, so none is added."""
        encodings = self._backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        return [
            Encoded(np.array(e.ids, np.int32), mask_of(r, e.offsets))
            for r, e in zip(rendered, encodings, strict=True)
        ]

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, special ones included."""
        return self._backend.decode(tokens, skip_special_tokens=False)

    def _apply(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_answers,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            # Only what the template itself raises is its own text; other errors can quote the conversation.
            own = type(error) is jinja2.TemplateError
            reason = _first_line(error) if own else f"{type(error).__name__} inside the template"
            raise TemplateRefusedError(reason) from None
        return texts[0], spans[0] if self._marks_answers else []

    def _try_out(self, where: str) -> None:
        """EyasError unless a plain question and answer can be rendered and followed; sets `_opened`."""
        question = {"role": "user", "content": "Which colour?"}
        try:
            rendered = self.render([question, {"role": "assistant", "content": "Blue."}])
            prompt, _ = self._apply([question], prompt=True)
        except (TemplateRefusedError, TemplateNotFollowedError) as error:
            raise EyasError(f"the chat template of {where} fails on a plain conversation: {error}") from None
        if not rendered.spans:
            raise EyasError(f"the chat template of {where} marks no answer in a plain conversation")
        self._opened = prompt.rstrip().endswith(THINK)

    def _closed(self, text: str, start: int, end: int) -> Span:
        if text.endswith(self._specials, start, end):
            return start, end
        closing = self._closing.match(text, end)
        return start, closing.end() if closing else end

    def _trimmed(self, text: str, start: int, end: int) -> Span:
        """A template's own span, without the white space that it may have behind the closing token."""
        stripped = start + len(text[start:end].rstrip())
        return (start, stripped) if text.endswith(self._specials, start, stripped) else (start, end)


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


def _with_fixed_date(template: str) -> str:
    if "strftime_now" not in template:
        return template
    replaced = "".join(f".replace('{code}', '{text}')" for code, text in _DATE.items())
    # The newline is taken off again by trim_blocks, which transformers sets.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"


def _load_tokenizer(folder: str) -> Any:
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as copy:
            for name in storage.list_names(folder):
                if name.endswith(_SMALL_FILES) and not name.endswith(".index.json"):
                    storage.write_bytes(
                        storage.join(copy, name), storage.read_bytes(storage.join(folder, name))
                    )
            return _load_local(copy, folder)
    return _load_local(storage.local_path(folder), folder)


def _load_local(path: str, shown: str) -> Any:
    config = os.path.join(path, "tokenizer_config.json")
    if storage.exists(config) and "auto_map" in storage.read_json(config):
        raise EyasError(
            f"{shown}/tokenizer_config.json asks to run code of its own (auto_map), which is never done; "
            "use a folder whose tokenizer.json stands alone and remove auto_map"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises plain Exception for a damaged file
        raise EyasError(f"the tokenizer of {shown} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception, limit: int = 200) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]
