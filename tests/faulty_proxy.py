"""An HTTP proxy for a server on this machine: requests may fail in every way that a network's do."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from tests.listening import listening

FAULTS = ("429", "503", "refuse", "lose", "delay", "cut")
_HOP = ("connection", "transfer-encoding", "content-length", "host")


class Sometimes:
    """A fault for that share of requests, each kind equally often, in an order that the seed gives."""

    def __init__(self, share: float, seed: int):
        self.share, self.seen = share, Counter()
        self._draw, self._lock = random.Random(seed), threading.Lock()

    def __call__(self, _: str) -> str | None:
        with self._lock:
            fault = self._draw.choice(FAULTS) if self._draw.random() < self.share else None
            self.seen[fault] += 1
            return fault


@contextmanager
def faulty(upstream: str, choose: Callable[[str], str | None]) -> Iterator[str]:
    """The URL of a proxy of `upstream`. `choose(request)` ("GET /path") names its fault, None: none.

    A number is the status that is answered, without asking upstream. `refuse` closes the connection unasked,
    `lose` after upstream has done what was wanted; `delay` answers after two seconds, `hang` never;
    `cut` ends the answer in its middle.
    """
    server_host, over = urlsplit(upstream).netloc, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self._body()
            fault = choose(f"{self.command} {self.path}")
            if fault == "refuse":
                return self._close()
            if fault == "hang":
                over.wait(300)
                return self._close()
            if fault is not None and fault.isdigit():
                return self._answer(int(fault), {}, b'{"error": {"code": %s}}' % fault.encode())
            try:
                status, headers, answer = self._ask(body)
            except (OSError, HTTPException):
                return self._close()
            if fault == "lose":
                return self._close()
            if fault == "delay":
                time.sleep(2)
            self._answer(status, headers, answer, whole=fault != "cut")

        do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = HTTPConnection(server_host, timeout=60)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes, whole: bool = True) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(body if whole else body[: len(body) // 2])
            if not whole:
                self._close()

        def _close(self) -> None:
            self.close_connection = True

        def log_message(self, *_):
            """Says nothing."""

    with listening(Handler) as port:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()
