"""Raw records become conversations of system, user and assistant turns; every change and loss is counted.

The rules, in their order, with the names of their counts. `dropped_*` counts conversations, `turns_*` turns.

- `read`: records met; `read` = kept + all `dropped_*`.
- `dropped_malformed`: not an object with a list of turns, or a turn whose content is no text.
- `dropped_unknown_role`: a role other than those of ROLES (tool calls, say).
- `turns_renamed`: a role under another name (`chatgpt`, `bing`, `bard`, ...) becomes one of the three.
- `turns_reasoning`: a `reasoning_content` beside the content is set in front of it in `<think>` tags.
- `turns_repaired`: characters that are no Unicode text (lone surrogates) become U+FFFD.
- `turns_empty`: turns of nothing but white space are left out.
- `turns_sharing_notice`: system turns in which a web page says that it shared the chat are left out.
- `turns_late_system`: a system turn that does not come first is left out.
- `turns_leading_assistant`: answers before the first question are left out (the question is in an earlier
  chunk of the same chat).
- `turns_joined`: a turn that follows one of the same role is appended to it behind an empty line.
- `turns_unanswered`: the turns behind the last answer are left out.
- `dropped_empty`: no turn with text to begin with.
- `dropped_no_assistant`: no assistant turn is left.
- `dropped_duplicate`: the same turns as an earlier conversation.

Text is otherwise left as it is, white space included: the chat template decides about that.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dump.answer_spans import END_THINK, THINK, Messages
from dump.conversations import TURN_KEYS

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
COUNTS = (
    "read",
    "dropped_malformed",
    "dropped_unknown_role",
    "dropped_empty",
    "dropped_no_assistant",
    "dropped_duplicate",
    "turns_renamed",
    "turns_reasoning",
    "turns_repaired",
    "turns_empty",
    "turns_sharing_notice",
    "turns_late_system",
    "turns_leading_assistant",
    "turns_joined",
    "turns_unanswered",
)
_PLAIN_ROLES = {"system", "user", "human", "assistant", "gpt"}
_CHUNK = re.compile(r"(.+)_\d+")
_SHARING_NOTICE = re.compile(r"\s*\*This (chat )?conversation is shared from .*\*\s*")


@dataclass(frozen=True)
class Conversation:
    """A cleaned conversation: an optional system turn, then user and assistant turns, an answer last."""

    id: str
    base: str  # the id without ShareGPT's chunk number: chunks of one chat share it
    messages: Messages


class _DropError(Exception):
    """The record cannot be used; str() is the count's name."""


@dataclass
class Cleaner:
    """Applies the rules record by record and counts what they do."""

    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    _seen: set[bytes] = field(default_factory=set)

    def clean(self, record: Any, number: int, name: str) -> Conversation | None:
        """The conversation of the `number`-th record (from 0) of file `name`; None if it was dropped."""
        self.counts["read"] += 1
        try:
            messages = self._messages(_turns(record))
            key = hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).digest()
            if key in self._seen:
                raise _DropError("dropped_duplicate")
        except _DropError as reason:
            self.counts[str(reason)] += 1
            return None
        self._seen.add(key)
        given = record.get("id")
        found = _repaired(str(given)) if isinstance(given, (str, int)) and str(given) else f"{name}#{number}"
        chunk = _CHUNK.fullmatch(found)
        return Conversation(found, chunk[1] if chunk else found, messages)

    def _messages(self, turns: list[Any]) -> Messages:
        messages = [self._message(turn) for turn in turns]
        found = [m for m in messages if m["content"].strip()]
        self.counts["turns_empty"] += len(messages) - len(found)
        if not found:
            raise _DropError("dropped_empty")
        found = self._keep_system(found)
        found = self._drop_leading_answers(found)
        found = self._join(found)
        while found and found[-1]["role"] != "assistant":
            found.pop()
            self.counts["turns_unanswered"] += 1
        if not found:
            raise _DropError("dropped_no_assistant")
        return found

    def _message(self, turn: Any) -> dict[str, str]:
        if not isinstance(turn, dict):
            raise _DropError("dropped_malformed")
        given = _first(turn, "from", "role")
        if not isinstance(given, str) or given.lower() not in ROLES:
            raise _DropError("dropped_unknown_role")
        content = _text(_first(turn, "value", "content"))
        if turn.get("tool_calls"):
            raise _DropError("dropped_unknown_role")
        reasoning = turn.get("reasoning_content")
        if isinstance(reasoning, str) and reasoning.strip():
            self.counts["turns_reasoning"] += 1
            content = f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{content}"
        repaired = _repaired(content)
        self.counts["turns_repaired"] += repaired != content
        self.counts["turns_renamed"] += given not in _PLAIN_ROLES
        return {"role": ROLES[given.lower()], "content": repaired}

    def _keep_system(self, messages: Messages) -> Messages:
        kept = []
        for message in messages:
            if message["role"] != "system":
                kept.append(message)
            elif _SHARING_NOTICE.fullmatch(message["content"]):
                self.counts["turns_sharing_notice"] += 1
            elif kept:
                self.counts["turns_late_system"] += 1
            else:
                kept.append(message)
        return kept

    def _drop_leading_answers(self, messages: Messages) -> Messages:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
        kept = [m for m in messages[:first] if m["role"] == "system"] + messages[first:]
        self.counts["turns_leading_assistant"] += len(messages) - len(kept)
        return kept

    def _join(self, messages: Messages) -> Messages:
        joined: Messages = []
        for message in messages:
            if joined and joined[-1]["role"] == message["role"]:
                joined[-1] = message | {"content": f"{joined[-1]['content']}\n\n{message['content']}"}
                self.counts["turns_joined"] += 1
            else:
                joined.append(message)
        return joined


def _turns(record: Any) -> list[Any]:
    if isinstance(record, dict):
        for key in TURN_KEYS:
            if isinstance(record.get(key), list):
                return record[key]
    raise _DropError("dropped_malformed")


def _first(turn: dict[str, Any], *keys: str) -> Any:
    """The first of `keys` that is set; a Parquet struct has every key, and null where a turn has none."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text(content: Any) -> str:
    """The text of a turn: a string, or OpenAI's list of parts if all of them are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        parts = [p.get("text") for p in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    raise _DropError("dropped_malformed")


def _repaired(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
