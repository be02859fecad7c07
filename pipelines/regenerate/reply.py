"""What a server replied becomes an answer; nothing that it says is trusted to have the right type."""

from collections.abc import Iterator
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
_TEXTS = ("content", "reasoning_content", "reasoning")
_FIELDS = (*_TEXTS, *_CALLS)  # as they are given


class RubbishError(ValueError):
    """A reply that is none; says why, without quoting it."""


def read_reply(body: bytes) -> Answer:
    """The answer of a chat completion. RubbishError if it is none, or was broken off."""
    value = _parsed(body)
    choice = _choice(value)
    if not isinstance(choice.get("message"), dict):
        raise RubbishError("the reply has no message")
    return judged(choice["message"], choice.get("finish_reason"), _tokens(value))


def read_stream(body: bytes) -> Answer:
    """The same of one that came as events, whose deltas are put together."""
    texts: dict[str, list[str]] = {}
    calls: dict[int, dict[str, Any]] = {}
    finish, usage = None, None
    for event in events(body):
        usage = event.get("usage") or usage
        if event.get("choices") == []:  # an event of usage alone
            continue
        choice = _choice(event)
        finish = choice.get("finish_reason") or finish
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            raise RubbishError("an event has no delta")
        for name in (*_TEXTS, "refusal"):
            if isinstance(delta.get(name), str):
                texts.setdefault(name, []).append(delta[name])
        _add_calls(calls, delta.get("tool_calls"))
    message: dict[str, Any] = {name: "".join(parts) for name, parts in texts.items()}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return judged(message, finish, _tokens({"usage": usage}))


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """The objects of a stream, up to its end. RubbishError for one that is none."""
    for line in body.splitlines():
        if not line.startswith(b"data:"):
            continue
        if line[5:].strip() == b"[DONE]":
            break
        yield _parsed(line[5:])


def read_problem(body: bytes) -> str:
    """What a server says is wrong: OpenAI's `error.message`, FastAPI's `detail`; empty if it says nothing."""
    try:
        value = strict_json.parse(body, "the reply")
    except EyasError:
        return ""
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name) is not None:
            value = value[name]
    return value if isinstance(value, str) else ""


def _add_calls(calls: dict[int, dict[str, Any]], deltas: Any) -> None:
    """Adds to each call, by its index, what is said of it: its name once, its arguments piece by piece."""
    for delta in deltas if isinstance(deltas, list) else []:
        said = delta.get("function") if isinstance(delta, dict) else None
        index = delta.get("index") if isinstance(delta, dict) else None
        if not isinstance(said, dict) or type(index) is not int:
            raise RubbishError("an event calls a tool in a way of its own")
        call = calls.setdefault(index, {"type": "function", "function": {"name": "", "arguments": ""}})
        call |= {"id": delta["id"]} if isinstance(delta.get("id"), str) else {}
        for name in ("name", "arguments"):
            if isinstance(said.get(name), str):
                call["function"][name] += said[name]


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = strict_json.parse(data, "the reply")
    except EyasError:
        raise RubbishError("the reply is not JSON") from None
    if not isinstance(value, dict):
        raise RubbishError("the reply is no object")
    return value


def _choice(value: dict[str, Any]) -> dict[str, Any]:
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RubbishError("the reply has no choice")
    return choices[0]


def judged(message: dict[str, Any], finish: Any, tokens: int) -> Answer:
    """The answer of a message that ended by `finish`. RubbishError for a reason that nobody knows."""
    if finish not in (*_ENDED, *_CALLED, *_CUT, _HELD_BACK):
        known = isinstance(finish, str) and finish.isidentifier()
        raise RubbishError(f"the reply ended by {finish[:30] if known else 'no known reason'}")
    return _answer(message, finish, tokens)


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
