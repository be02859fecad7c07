"""The shapes in which data sets hold conversations; each becomes turns, definitions of tools and an id.

- Turns: a list under `conversations`, `messages`, `conversation`, `dialog`, `dialogue`, `dialogues`, `turns`,
  `chat` or `items`, or the record itself: objects with a role and a text (dump/turn_fields.py); pairs of
  `human`/`assistant`, `user`/`assistant`, `input`/`output` or `prompt`/`response`; or strings, question and
  answer by turns (also under `data`). The list may be a string of JSON.
- Preferences: `chosen` (behind `prompt`, where it does not begin with it); `rejected` is not read.
- A question and an answer, or a question alone: `instruction` (with `input` or `context`), `prompt`,
  `question`, `query`, `problem` or `input`, a text or a list of turns; `output`, `response`, `completion`,
  `answer`, `answers` or `solution`; `history`, a list of pairs, comes first.
- Beside them: `system`, `system_prompt` or `system_message`; `tools` or `functions`, also inside of a
  `metadata` that is a string of JSON; an id under `id`, `conversation_id`, `prompt_id`, `uuid` or
  `conversation_hash`; beside a single answer its reasoning under `reasoning_content`, `thinking`,
  `complex_cot`, `cot`, `deepseek_reasoning`, `thinking_trajectories` or `reasoning`.

Names of fields are compared without regard to capitals. A list that comes first and is not empty is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dump.turn_fields import ROLE_KEYS, MalformedError, first, parsed, read_calls

TURN_KEYS = (
    "conversations", "messages", "conversation", "dialog", "dialogue", "dialogues", "turns", "chat", "items",
)  # fmt: skip
QUESTION_KEYS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWER_KEYS = ("output", "response", "completion", "answer", "answers", "deepseek_solution", "solution")
_PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("prompt", "response"),
          ("question", "answer"), ("instruction", "output"))  # fmt: skip
_CONTEXT_KEYS = ("input", "context")
_SYSTEM_KEYS = ("system", "system_prompt", "system_message")
_TOOL_KEYS = ("tools", "functions")
_REASONING_KEYS = ("reasoning_content", "thinking", "complex_cot", "cot", "deepseek_reasoning",
                   "thinking_trajectories", "reasoning")  # fmt: skip
_ID_KEYS = ("id", "conversation_id", "prompt_id", "uuid", "conversation_hash")
FIELDS = {
    *TURN_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, *_CONTEXT_KEYS, *_SYSTEM_KEYS, *_TOOL_KEYS, *_REASONING_KEYS,
    *_ID_KEYS, "chosen", "history", "data", "metadata", "category", "question_id",
}  # fmt: skip


def usable(names: list[str]) -> bool:
    """Whether a record with fields of these names can hold a conversation."""
    found = {name.lower() for name in names}
    return bool(found & {*TURN_KEYS, *QUESTION_KEYS, "chosen", "data"})


EXPECTED = "a list of turns under conversations or messages, or a question and an answer"


@dataclass(frozen=True)
class Record:
    """A record's turns as the file has them, its definitions of tools, its id or None."""

    turns: list[Any]
    tools: list[dict[str, Any]]
    id: str | None


def read_record(value: Any) -> Record:
    """MalformedError if `value` has none of the shapes above."""
    if isinstance(value, list):
        return Record(_turns(value), [], None)
    if not isinstance(value, dict):
        raise MalformedError("dropped_malformed")
    fields = {str(name).lower(): field for name, field in value.items() if field is not None}
    listed = _listed(fields)
    turns = (
        listed or _preferred(fields) or _asked(fields) or listed
    )  # an empty list has no turns, but a shape
    if turns is None:
        raise MalformedError("dropped_malformed")
    system = first(fields, *_SYSTEM_KEYS)
    if isinstance(system, str) and system.strip() and not _begins_with_system(turns):
        turns = [{"role": "system", "content": system}, *turns]
    given = first(fields, *_ID_KEYS)
    named = isinstance(given, (str, int)) and not isinstance(given, bool) and str(given)
    tools = first(fields, *_TOOL_KEYS)
    if tools is None and isinstance(fields.get("metadata"), str):
        inside = parsed(fields["metadata"])
        tools = first(inside, *_TOOL_KEYS) if isinstance(inside, dict) else None
    return Record(turns, _tools(tools), str(given) if named else None)


def describe(value: Any) -> str:
    """The shape of a record in words: the names of its fields, never what they hold."""
    if isinstance(value, dict):
        names = [str(name)[:30] for name in value][:8]
        return f"an object with {', '.join(names)}" if names else "an empty object"
    kinds = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def unwrapped(value: Any) -> Iterator[Any]:
    """The records of a JSON value: itself, or those of a list, of lists, or of an object around one list."""
    if value == []:
        return
    if _is_records(value):
        for item in value:
            yield from item if _is_records(item) else (item,)
        return
    if isinstance(value, dict) and not _is_record(value):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], (dict, list))]
        if len(lists) == 1:
            yield from lists[0]
            return
    yield value


def _is_records(value: Any) -> bool:
    """Whether a list holds records, and is not the turns of one."""
    if not isinstance(value, list) or not value:
        return False
    return not isinstance(value[0], str) and _pair(value[0]) is None and not _has_role(value[0])


def _has_role(turn: Any) -> bool:
    """Whether an object is a turn; a record may have a role of its own (a row of a tree of messages)."""
    return isinstance(turn, dict) and any(key in turn for key in ROLE_KEYS) and not _is_record(turn)


def _is_record(value: dict[str, Any]) -> bool:
    names = {str(name).lower() for name in value}
    if isinstance(value.get("conversations"), list) and value["conversations"]:
        head = value["conversations"][0]  # an export may hold its records under the name of turns
        return not (isinstance(head, dict) and any(key in head for key in TURN_KEYS)) and not (
            isinstance(head, list)
        )
    if names & {*QUESTION_KEYS} and names & {*ANSWER_KEYS, *_TOOL_KEYS, *_ID_KEYS}:
        return True
    asked = (value.get(key) for key in QUESTION_KEYS)
    talks = any(isinstance(turns, list) and turns and _has_role(turns[0]) for turns in asked)
    return talks or bool(names & {*TURN_KEYS, "chosen"})


def _listed(fields: dict[str, Any]) -> list[Any] | None:
    found = None
    for key in (*TURN_KEYS, "data"):
        turns = fields.get(key)
        if isinstance(turns, str) and turns.lstrip()[:1] == "[":
            turns = parsed(turns)
        if isinstance(turns, list):
            if turns:
                return _turns(turns)
            found = turns
    return found


def _turns(turns: list[Any]) -> list[Any]:
    """Turns of objects with roles; pairs and alternating strings are given roles."""
    if turns and all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    made = []
    for turn in turns:
        pair = _pair(turn)
        made += [turn] if pair is None else pair
    return made


def _pair(turn: Any) -> list[Any] | None:
    if isinstance(turn, dict) and not any(key in turn for key in ROLE_KEYS):
        for asked, answered in _PAIRS:
            if asked in turn and answered in turn:
                return _exchange(turn[asked], turn[answered])
    return None


def _exchange(question: Any, answer: Any, **more: Any) -> list[Any]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def _preferred(fields: dict[str, Any]) -> list[Any] | None:
    chosen, prompt = fields.get("chosen"), fields.get("prompt")
    if isinstance(chosen, str) and isinstance(prompt, str):
        return _exchange(prompt, chosen)
    if isinstance(chosen, list) and chosen:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        turns = _turns(chosen)
        answer_only = isinstance(prompt, list) and isinstance(turns[0], dict) and len(turns) == 1
        return [*prompt, *turns] if answer_only else turns
    return None


def _asked(fields: dict[str, Any]) -> list[Any] | None:
    """A question with one answer or none; the question may be a list of turns."""
    asked = next((key for key in QUESTION_KEYS if fields.get(key)), None)
    answered = next((key for key in ANSWER_KEYS if fields.get(key)), None)
    if asked is None:
        return None
    question, answer = fields[asked], fields.get(answered)
    if isinstance(answer, list) and answer and isinstance(answer[0], dict) and not isinstance(question, str):
        return [*_turns(question), *_turns(answer)] if isinstance(question, list) else None
    reply: dict[str, Any] = {"role": "assistant", "content": answer}
    calls = parsed(answer) if isinstance(answer, str) and answered == "answers" else answer
    if answered == "answers" and isinstance(calls, list):
        reply = {"role": "assistant", "content": "", "tool_calls": read_calls(calls)}
    thought = first(fields, *_REASONING_KEYS)
    if thought not in (None, "on", "off"):
        reply["reasoning_content"] = thought[0] if isinstance(thought, list) and thought else thought
    reply_or_none = [reply] if answered else []
    if isinstance(question, list):
        return [*_turns(question), *reply_or_none]
    context = next((fields[k] for k in _CONTEXT_KEYS if k != asked and isinstance(fields.get(k), str)), "")
    if isinstance(question, str) and context.strip():
        question = f"{question}\n\n{context}"
    history = fields.get("history")
    earlier = [pair for pair in history if isinstance(pair, list)] if isinstance(history, list) else []
    before = [turn for pair in earlier if len(pair) == 2 for turn in _exchange(*pair)]
    return [*before, {"role": "user", "content": question}, *reply_or_none]


def _begins_with_system(turns: list[Any]) -> bool:
    role = first(turns[0], *ROLE_KEYS) if turns and isinstance(turns[0], dict) else None
    return isinstance(role, str) and role.strip().lower() in ("system", "developer")


def _tools(value: Any) -> list[dict[str, Any]]:
    """Definitions as templates take them: {"type": "function", "function": {...}}."""
    value = parsed(value) if isinstance(value, str) and value.strip() else value
    if not value:
        return []
    tools = value if isinstance(value, list) else [value]
    tools = [parsed(tool) if isinstance(tool, str) else tool for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise MalformedError("dropped_malformed")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
