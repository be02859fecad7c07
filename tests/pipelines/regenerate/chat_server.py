"""A server on this machine that answers chat completions, well or in every way that servers fail."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.listening import listening

Choose = Callable[[dict[str, Any]], str | None]


def good(request: dict[str, Any]) -> dict[str, Any]:
    """A choice that is a function of the request alone."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:12]
    message = {"role": "assistant", "content": f"{len(request['messages'])} {digest} «é» 🌉"}
    return {"index": 0, "message": message, "finish_reason": "stop"}


def message(choice: dict[str, Any], finish: str = "stop", **fields: Any) -> dict[str, Any]:
    return choice | {"finish_reason": finish, "message": choice["message"] | fields}


CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}}
BAD_CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": '}}
# Replies with status 200, made from a good choice.
ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "length": lambda c: {"choices": [message(c, "length")]},
    "filter": lambda c: {"choices": [message(c, "content_filter", content="")]},
    "refusal": lambda c: {"choices": [message(c, content=None, refusal="I may not")]},
    "empty": lambda c: {"choices": [message(c, content=" \n")]},
    "null": lambda c: {"choices": [message(c, content=None)]},
    "thought": lambda c: {"choices": [message(c, content="", reasoning_content="hm")]},
    "half thought": lambda c: {"choices": [message(c, "length", content=None, reasoning="hm")]},
    "reasoning": lambda c: {"choices": [message(c, reasoning_content="so it is", reasoning="so it is")]},
    "parts": lambda c: {"choices": [message(c, content=[{"type": "text", "text": "in parts"}])]},
    "call": lambda c: {"choices": [message(c, "tool_calls", content=None, tool_calls=[CALL])]},
    "bad call": lambda c: {"choices": [message(c, "tool_calls", content=None, tool_calls=[BAD_CALL])]},
}
# Replies with status 200 that are no answers.
RUBBISH: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no choices": lambda c: {"choices": []},
    "choices null": lambda c: {"choices": None},
    "no object": lambda c: [c],
    "number": lambda c: 7,
    "no message": lambda c: {"choices": [{"finish_reason": "stop"}]},
    "text for a choice": lambda c: {"choices": ["yes"]},
    "content a number": lambda c: {"choices": [message(c, content=7)]},
    "content an image": lambda c: {"choices": [message(c, content=[{"type": "image"}])]},
    "calls a text": lambda c: {"choices": [message(c, content=7, tool_calls="x")]},
    "aborted": lambda c: {"choices": [message(c, "abort")]},
    "no reason": lambda c: {"choices": [c | {"finish_reason": None}]},
    "reason a list": lambda c: {"choices": [c | {"finish_reason": []}]},
}
RAW = {
    "html": b"<html>Hello</html>",
    "nothing": b"",
    "half": b'{"choices": [{"message": {"role": "assis',
    "nan": b'{"choices": [{"message": {"content": NaN}, "finish_reason": "stop"}]}',
    "deep": b"[" * 100_000,
    "not utf-8": b'{"choices": "\xff"}',
}


class Server:
    """What it was asked: `requests` with the headers of each, and how many at once at most."""

    def __init__(self, choose: Choose) -> None:
        self.choose, self.requests, self.headers = choose, [], []
        self.lock, self.now, self.most, self.delay = threading.Lock(), 0, 0, 0.0
        self.over, self.url = threading.Event(), ""

    def begin(self, request: dict[str, Any], headers: dict[str, str]) -> str | None:
        with self.lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.now += 1
            self.most = max(self.most, self.now)
            return self.choose(request)

    def end(self) -> None:
        with self.lock:
            self.now -= 1


@contextmanager
def chat_server(choose: Choose = lambda request: None, delay: float = 0.0) -> Iterator[Server]:
    """`choose(request)` names a reply of those above, a status (`429 2`: with Retry-After), or a way to fail:
    close, cut, hang, slow (a byte now and then), drip (in pieces), huge, gzip, junk; None: a good answer.
    """
    server = Server(choose)
    server.delay = delay  # seconds of every reply

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.path != "/v1/chat/completions":
                return self._send(404, b'{"detail": "Not Found"}')
            request = json.loads(data)
            way = server.begin(request, dict(self.headers))
            try:
                time.sleep(server.delay)
                self._reply(request, way)
            except OSError:
                self.close_connection = True  # the client went away
            finally:
                server.end()

        def _reply(self, request, way):
            choice = good(request)
            whole = {"choices": [choice], "usage": {"completion_tokens": 5}}
            if way in ANSWERS:
                whole = ANSWERS[way](choice) | {"usage": {"completion_tokens": 5}}
                way = None
            if way in RUBBISH:
                return self._send(200, _json(RUBBISH[way](choice)))
            if way in RAW:
                return self._send(200, RAW[way])
            if way and way.split()[0].isdigit():
                status, *after = way.split(maxsplit=1)
                headers = {"Retry-After": after[0]} if status == "429" and after else {}
                said = f"bad {self.headers.get('authorization')}\x1b\n"
                return self._send(int(status), _json({"error": {"message": said}}), headers)
            if way in ("close", "hang"):
                server.over.wait(60 if way == "hang" else 0)
                self.close_connection = True
            elif way == "junk":
                self.wfile.write(b"\x00\x01 hello\r\n\r\n")
                self.close_connection = True
            elif way == "gzip":
                self._send(200, _json(whole), {"Content-Encoding": "gzip"})
            elif way == "huge":
                self._send(200, b" " * (3 << 20) + _json(whole))
            elif request["stream"]:
                self._send(200, events(whole), {"Content-Type": "text/event-stream; charset=utf-8"}, way)
            else:
                self._send(200, _json(whole), way=way)

        def _send(self, status, body, headers=(), way=None):
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if way == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif way in ("slow", "drip"):
                step = len(body) // 8
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    if server.over.wait(0.2 if way == "slow" else 0.01):
                        break
            else:
                self.wfile.write(body)

        def log_message(self, *_):
            """Says nothing."""

    with listening(Handler) as port:
        server.url = f"http://127.0.0.1:{port}/v1"
        try:
            yield server
        finally:
            server.over.set()


def events(whole: dict[str, Any]) -> bytes:
    """A completion as a server streams it: an event a few characters, the calls in two, usage at the end."""
    (choice,) = whole["choices"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "reasoning", "content", "refusal"):
        text = choice["message"].get(name)
        text = text[0]["text"] if isinstance(text, list) else text or ""
        deltas += [{name: text[start : start + 3]} for start in range(0, len(text), 3)]
    for call in choice["message"].get("tool_calls", []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        first = {"index": 0, "id": call["id"], "type": "function", "function": {"name": name}}
        more = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:4], arguments[4:])]
        deltas += [{"tool_calls": [part]} for part in (first, *more)]
    parts = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    parts.append({"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    parts.append({"choices": [], "usage": whole["usage"]})
    lines = [": ping", *(f"data: {json.dumps(part)}" for part in parts), "data: [DONE]"]
    return "".join(f"{line}\n\n" for line in lines).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
