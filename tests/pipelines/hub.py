"""A small server with the Hub's endpoints for one repository: revision, tree, and files in ranges."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files` as `repository`; `requests` are (method, path, Range header) as they came.

    `cut`: {file: bytes after which its first whole download breaks off}. `stall`: files that never end.
    """

    daemon_threads = True

    def __init__(self, repository: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.files = repository, files
        self.cut: dict[str, int] = {}
        self.stall: set[str] = set()
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self, name: str) -> list[str | None]:
        """The Range headers of the downloads of a file."""
        return [ranged for method, path, ranged in self.requests if method == "GET" and path.endswith(name)]

    def handle_error(self, request, client_address) -> None:
        """Clients that were killed are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args) -> None:
        """Silent."""

    def _answer(self) -> None:
        path, hub = urlsplit(self.path).path, self.server
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if path == f"/api/models/{hub.repository}/revision/main":
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": hub.repository, "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"/api/models/{hub.repository}/tree/{COMMIT}"):
            return self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
            )
        name = path.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
        if name in hub.files:
            return self._file(name)
        self._send(404, b"not found", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(found[1]) if found else 0
        about = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if found:
            about["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._send(206 if found else 200, data[first:], about, name)

    def _send(self, status: int, data: bytes, about: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in (about | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.server
        if name in hub.stall:
            self.wfile.write(data[: len(data) // 2])
            hub.stalled.set()
            hub.closing.wait()
        elif name in hub.cut:
            self.wfile.write(data[: hub.cut.pop(name)])
            self.close_connection = True
        else:
            self.wfile.write(data)


@contextmanager
def serve(repository: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """A running server."""
    hub = Hub(repository, files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
