"""What a server replied becomes an answer; nothing that it says is trusted to have the right type."""

from typing import Any

from common import strict_json
from common.errors import EyasError
from dump.turn_fields import MalformedError, Turn, read_turn
from pipelines.regenerate.answerer import CALLED, EMPTY, REFUSED, TRUNCATED, UNREADABLE, WHOLE, Answer

_ENDED = ("stop", "eos_token", "stop_sequence", "end_turn")
_CALLED = ("tool_calls", "function_call")
_CUT = ("length", "max_tokens")
_HELD_BACK = "content_filter"
_CALLS = ("tool_calls", "function_call")
_FIELDS = ("content", "reasoning_content", "reasoning", *_CALLS)  # as they are given


class RubbishError(ValueError):
    """A reply that is none; says why, without quoting it."""


def read_reply(body: bytes) -> Answer:
    """The answer of a chat completion. RubbishError if it is none, or was broken off."""
    try:
        value = strict_json.parse(body, "the reply")
    except EyasError:
        raise RubbishError("the reply is not JSON") from None
    choices = value.get("choices") if isinstance(value, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise RubbishError("the reply has no choice with a message")
    finish = choice.get("finish_reason")
    if finish not in (*_ENDED, *_CALLED, *_CUT, _HELD_BACK):
        known = isinstance(finish, str) and finish.isidentifier()
        raise RubbishError(f"the reply ended by {finish[:30] if known else 'no known reason'}")
    return _answer(message, finish, _tokens(value))


def read_problem(body: bytes) -> str:
    """What a server says is wrong: OpenAI's `error.message`, FastAPI's `detail`; empty if it says nothing."""
    try:
        value = strict_json.parse(body, "the reply")
    except EyasError:
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name) is not None:
            value = value[name]
    return " ".join(value.split())[:200] if isinstance(value, str) else ""


def _answer(message: dict[str, Any], finish: str, tokens: int) -> Answer:
    recorded = {name: message[name] for name in _FIELDS if message.get(name) not in (None, [])}
    recorded = {"role": "assistant", "content": ""} | recorded
    turn, readable = _read(recorded)
    if not isinstance(recorded["content"], str):  # a list of parts
        recorded["content"] = turn.content
    if not readable or not turn.calls:
        recorded = {name: value for name, value in recorded.items() if name not in _CALLS}
    refusal = message.get("refusal")
    if finish == _HELD_BACK or (isinstance(refusal, str) and refusal.strip()):
        kind = REFUSED
    elif finish in _CUT:
        kind = TRUNCATED if turn.content.strip() or turn.reasoning else EMPTY
    elif turn.calls:
        kind = CALLED
    elif not readable:
        kind = UNREADABLE
    else:
        kind = WHOLE if turn.content.strip() else EMPTY
    return Answer(recorded | {"finish_reason": finish}, kind, tokens)


def _read(message: dict[str, Any]) -> tuple[Turn, bool]:
    """The turn as prepare will read it, and whether its calls can be read; without them if not."""
    try:
        return read_turn(message), True
    except MalformedError:
        pass
    try:
        return read_turn({name: value for name, value in message.items() if name not in _CALLS}), False
    except MalformedError:
        raise RubbishError("the reply's message has no text") from None


def _tokens(value: dict[str, Any]) -> int:
    usage = value.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens < 2**53 else 0
