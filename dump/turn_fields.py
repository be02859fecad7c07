"""One turn of a record, under the field names that data sets give to its role, text, reasoning and calls.

- role: `role`, `from`, `speaker` or `author`; ROLES lists the names of roles.
- text: `content`, `value`, `text` or `message`: a string, a list of text parts, or null for an empty turn.
- reasoning: `reasoning_content`, `reasoning`, `thinking`, `thought`, `thoughts`, `reasoning_details` (a list
  of objects with a text), parts of the type `thinking` or `reasoning`, or _TAGS in front of the text.
- calls: `tool_calls`, `function_call`, or a text of the role `function_call`: JSON of a name and arguments.
- cut off: `finish_reason` is `length` or `max_tokens`.
- left out of training: `weight` 0; `train`, `training`, `trainable` or `loss` false; `masked`, `mask` true;
  `finish_reason` `content_filter`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "function-call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
PLAIN_ROLES = {"system", "user", "human", "assistant", "gpt", "tool"}
_CALL_ROLES = {"function_call", "function-call", "tool_call"}
ROLE_KEYS = ("from", "role", "speaker", "author")
TEXT_KEYS = ("value", "content", "text", "message")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_details")
_TAGS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
]
_SOLUTION = re.compile(
    r"\s*(?:<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>)?|<answer>(.*?)</answer>)\s*", re.DOTALL
)


class MalformedError(ValueError):
    """The turn cannot be used; str() is the count's name."""


@dataclass
class Turn:
    """A turn under our names. `calls` have a name and arguments; `counted`: the model learns to write it;
    `cut`: its end is missing."""

    role: str
    content: str
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    call_id: str = ""
    counted: bool = True
    renamed: bool = False
    cut: bool = False


def read_turn(turn: Any) -> Turn:
    """MalformedError: no object with a role and a text, a role not listed, calls or media it cannot read."""
    if not isinstance(turn, dict):
        raise MalformedError("dropped_malformed")
    given = first(turn, *ROLE_KEYS)
    if isinstance(given, dict):  # an author with a role
        given = given.get("role")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise MalformedError("dropped_unknown_role")
    if not any(key in turn for key in (*TEXT_KEYS, "tool_calls", "function_call")):
        raise MalformedError("dropped_malformed")
    content, thoughts = _parts(first(turn, *TEXT_KEYS))
    cut = turn.get("finish_reason") in ("length", "max_tokens")
    calls: list[dict[str, Any]] = []
    if role == "assistant":
        thoughts += [_thought(turn.get(key)) for key in _REASONING_KEYS]
        calls = [call for key in ("tool_calls", "function_call") for call in _calls(turn.get(key))]
        if given.strip().lower() in _CALL_ROLES:
            calls, content = [*calls, *_calls(content)], ""
        inline, content = split_reasoning(content)
        thoughts.append(inline)
        if cut and not inline:
            inline, content = _unfinished(content)
            thoughts.append(inline)
    elif turn.get("tool_calls"):
        raise MalformedError("dropped_malformed")
    # A turn under two names says the same thing twice: OpenRouter gives `reasoning` and `reasoning_details`.
    reasoning = "\n\n".join(dict.fromkeys(t.strip() for t in thoughts if t.strip()))
    return Turn(
        role,
        content,
        reasoning,
        calls,
        name=_string(turn.get("name")) if role == "tool" else "",
        call_id=_string(turn.get("tool_call_id")),
        counted=not _masked(turn),
        renamed=given not in PLAIN_ROLES,
        cut=cut,
    )


def first(record: dict[str, Any], *keys: str) -> Any:
    """The first of `keys` that is set; a Parquet struct has every key, and null where a turn has none."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def split_reasoning(text: str) -> tuple[str, str]:
    """Reasoning in tags in front of `text`, and the answer behind it; ("", text) if there is none.

    The opening tag `<think>` may be missing, if the closing one begins or ends a line: where a prompt ends
    with the opening tag, a recorded answer begins behind it.
    """
    for opening, closing in _TAGS:
        before, found, answer = text.partition(closing)
        if not found:
            continue
        head, opened, reasoning = before.partition(opening)
        unopened = opening == "<think>" and not opened and (answer[:1] == "\n" or before[-1:] == "\n")
        if head.strip() and not unopened:
            continue
        solution = _SOLUTION.fullmatch(answer)
        answer = next(filter(None, solution.groups()), "").strip() if solution else answer
        return (reasoning if opened else before).strip(), answer.lstrip()
    return "", text


def _unfinished(text: str) -> tuple[str, str]:
    """(reasoning, "") of a text that was cut off while it was reasoning, else ("", text)."""
    begun = text.lstrip()
    opening = next((opening for opening, _ in _TAGS if begun.startswith(opening)), None)
    return (begun.removeprefix(opening).strip(), "") if opening else ("", text)


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Calls of tools as [{"name", "arguments": an object}]. MalformedError if they cannot be read."""
    return list(_calls(value))


def _parts(content: Any) -> tuple[str, list[str]]:
    """The text of a turn and the reasoning that stands among its parts."""
    if content is None:
        return "", []
    if isinstance(content, str):
        return content, []
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise MalformedError("dropped_malformed")
    texts, thoughts = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise MalformedError("dropped_malformed")
        kind = part.get("type", "text")
        if kind in ("thinking", "reasoning"):
            thoughts.append(_thought(part))
        elif kind in ("text", "output_text", "input_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise MalformedError("dropped_not_text")
    return "".join(texts), thoughts


def _thought(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _thought(first(value, "text", "thinking", "summary", "content", "reasoning"))
    if isinstance(value, list):
        return "\n\n".join(filter(None, map(_thought, value)))
    return ""


def _calls(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, str) and value.strip():
        value = parsed(value)
        if value is None:
            raise MalformedError("dropped_malformed")
    if not value:
        return
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else call
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise MalformedError("dropped_malformed")
        arguments = first(call, "arguments", "parameters")
        if isinstance(arguments, str):
            arguments = parsed(arguments) if arguments.strip() not in ("", "null") else {}
        elif arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise MalformedError("dropped_malformed")
        yield {"name": name, "arguments": arguments}


def parsed(text: str) -> Any:
    """The JSON value of a string, None if it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _masked(turn: dict[str, Any]) -> bool:
    flags = (turn.get(key) for key in ("weight", "train", "training", "trainable", "loss"))
    off = any(isinstance(flag, (int, float)) and flag == 0 for flag in flags)  # False is 0
    off = off or turn.get("finish_reason") == "content_filter"
    return off or any(turn.get(key) is True for key in ("masked", "mask"))


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""
