"""Raw records become conversations of system, user, assistant and tool turns; each change is counted.

The rules, in their order, with the names of their counts. `dropped_*` counts conversations, `turns_*` turns.

- `read`: records met; `read` = kept + all `dropped_*`.
- `dropped_malformed`: none of the shapes of dump/record_shapes.py and dump/turn_fields.py.
- `dropped_unknown_role`: a role that dump/turn_fields.py does not list.
- `dropped_not_text`: a turn with an image, sound or another part that is no text.
- `turns_renamed`: a role under another name (`chatgpt`, `bing`, `observation`, ...) becomes one of the four.
- `turns_reasoning`: turns with reasoning, whatever it was called; the target's template decides about it.
- `turns_repaired`: characters that are no Unicode text (lone surrogates) become U+FFFD.
- `turns_empty`: turns of nothing but white space, or null, are left out.
- `turns_sharing_notice`: system turns in which a web page says that it shared the chat are left out.
- `turns_late_system`: a system turn that does not come first is left out.
- `turns_leading_assistant`: answers before the first question are left out (the question is in an earlier
  chunk of the same chat), and tools' results there.
- `turns_joined`: a turn that follows one of the same role is appended to it behind an empty line; not a
  tool's result.
- `turns_unanswered`: the turns behind the last answer are left out.
- `turns_masked`: answers that the data set leaves out of training (`weight` 0, say): kept, and not counted.
- `turns_cut_off`: answers that were cut off (`finish_reason` is `length`): what closes them is not counted,
  nor is one that was cut off while it was reasoning.
- `dropped_empty`: no turn with text to begin with.
- `dropped_no_assistant`: no assistant turn is left.
- `dropped_duplicate`: the same turns as an earlier conversation.

Where only questions are wanted, the turns of assistants and tools are left out instead of the unanswered
ones, and there are `dropped_no_question` and `dropped_tools`: tools are called or heard, and not defined.

Text is otherwise left as it is, white space included: the chat template decides about that.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dump.answer_spans import Messages
from dump.digests import WIDTH, Digests
from dump.record_shapes import describe, read_record
from dump.turn_fields import MalformedError, Turn, read_turn

COUNTS = (
    "read",
    "dropped_malformed",
    "dropped_unknown_role",
    "dropped_not_text",
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
    "turns_masked",
    "turns_cut_off",
)
_SHAREGPT_CHUNK = re.compile(r"([A-Za-z0-9]{7})_(?:0|[1-9]\d*)")
_SHARING_NOTICE = re.compile(r"\s*\*This (chat )?conversation is shared from .*\*\s*")


@dataclass(frozen=True)
class Conversation:
    """A cleaned conversation: an optional system turn, then user, assistant and tool turns, an answer last.

    A message has a role and a content; where there are, also `reasoning`, `calls` of tools (name, arguments),
    the `name` and `call_id` of a tool's result, `counted` False for an answer not to learn from, and `cut`
    True for one whose end is missing. `source`: a number that its reader gave.
    """

    id: str
    base: str  # the id without ShareGPT's chunk number: chunks of one chat share it
    messages: Messages
    tools: list[dict[str, Any]] = field(default_factory=list)
    source: int = 0


@dataclass
class Cleaner:
    """Applies the rules record by record and counts what they do.

    `questions`: only a system turn and the user's turns are wanted, each of which is to be answered anew.
    `malformed`: the shape of the first record that had none of ours, in words.
    """

    questions: bool = False
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    malformed: str = ""
    _seen: Digests = field(default_factory=Digests)

    def clean(self, record: Any, number: int, name: str, source: int = 0) -> Conversation | None:
        """The conversation of the `number`-th record (from 0) of file `name`; None if it was dropped."""
        self.counts["read"] += 1
        try:
            found = read_record(record)
            messages = self._messages(found.turns)
            tools = _repaired_json(found.tools)
            messages = _asked(messages, tools) if self.questions else self._answered(messages)
            key = hashlib.blake2b(json.dumps([messages, tools]).encode(), digest_size=WIDTH).digest()
            if not self._seen.add(key):
                raise MalformedError("dropped_duplicate")
        except MalformedError as reason:
            self.counts[str(reason)] += 1
            if str(reason) == "dropped_malformed" and not self.malformed:
                self.malformed = _shape(record)
            return None
        self.counts["turns_masked"] += sum(not m.get("counted", True) for m in messages)
        self.counts["turns_cut_off"] += sum(m.get("cut", False) for m in messages)
        name = repaired(found.id) if found.id else f"{name}#{number}"
        return Conversation(name, base_of(name), messages, tools, source)

    def _messages(self, turns: list[Any]) -> Messages:
        messages = [self._message(read_turn(turn)) for turn in turns]
        found = [m for m in messages if _says_something(m)]
        self.counts["turns_empty"] += len(messages) - len(found)
        if not found:
            raise MalformedError("dropped_empty")
        found = self._keep_system(found)
        return self._join(self._drop_leading_answers(found))

    def _answered(self, messages: Messages) -> Messages:
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        self.counts["turns_unanswered"] += len(messages) - 1 - last
        if last < 0:
            raise MalformedError("dropped_no_assistant")
        return messages[: last + 1]

    def _message(self, turn: Turn) -> dict[str, Any]:
        given = {
            "content": turn.content,
            "reasoning": turn.reasoning,
            "name": turn.name,
            "call_id": turn.call_id,
        }
        texts = {name: repaired(text) for name, text in given.items() if text or name == "content"}
        calls = _repaired_json(turn.calls)
        changed = calls != turn.calls or any(given[name] != text for name, text in texts.items())
        self.counts["turns_repaired"] += changed
        self.counts["turns_renamed"] += turn.renamed
        self.counts["turns_reasoning"] += bool(turn.reasoning)
        is_answer = turn.role == "assistant"
        masked = is_answer and not (turn.counted and (turn.content.strip() or not turn.cut))
        return (
            {"role": turn.role}
            | texts
            | ({"calls": calls} if calls else {})
            | ({"counted": False} if masked else {})
            | ({"cut": True} if is_answer and turn.cut else {})
        )

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
            if joined and joined[-1]["role"] == message["role"] != "tool":
                joined[-1] = _together(joined[-1], message)
                self.counts["turns_joined"] += 1
            else:
                joined.append(message)
        return joined


def _asked(messages: Messages, tools: list[dict[str, Any]]) -> Messages:
    """The system turn and the user's turns."""
    if not tools and any(m["role"] == "tool" or m.get("calls") for m in messages):
        raise MalformedError("dropped_tools")
    if not any(m["role"] == "user" for m in messages):
        raise MalformedError("dropped_no_question")
    return [m for m in messages if m["role"] in ("system", "user")]


def base_of(name: str) -> str:
    """The id without ShareGPT's chunk number."""
    chunk = _SHAREGPT_CHUNK.fullmatch(name)
    return chunk[1] if chunk else name


def _shape(record: Any) -> str:
    """What a malformed record is, in words: its fields, or those of the first turn that cannot be read."""
    try:
        turns = read_record(record).turns
    except MalformedError:
        return describe(record)
    for turn in turns:
        try:
            read_turn(turn)
        except MalformedError:
            return f"one with a turn that is {describe(turn)}"
    return describe(record)


def _says_something(message: dict[str, Any]) -> bool:
    texts = (message["content"], message.get("reasoning", ""))
    return message["role"] == "tool" or bool(message.get("calls")) or any(text.strip() for text in texts)


def _together(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """One turn of two of the same role; it is learnt from only if both are."""
    made = {name: value for name, value in one.items() if name != "cut"} | two
    for key in ("content", "reasoning"):
        texts = [m[key] for m in (one, two) if m.get(key)]
        if texts:
            made[key] = "\n\n".join(texts)
    calls = one.get("calls", []) + two.get("calls", [])
    return made | ({"calls": calls} if calls else {})


def repaired(text: str) -> str:
    """`text`, with U+FFFD for what is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _repaired_json(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Definitions or calls as plain JSON; what is held besides, a date or NaN say, becomes text."""
    if not values:
        return []
    text = repaired(json.dumps(values, ensure_ascii=False, default=str))
    return json.loads(text, parse_constant=str)
