"""A server that answers every request of Google Cloud Storage's clients with one status, or never."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from tests.listening import listening


@contextmanager
def refusing(status: int | None) -> Iterator[int]:
    """The port of the server; `status` None takes requests and lets them wait."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            if status is None:
                over.wait(100)
                return
            message = {401: "Invalid token", 403: "x lacks access", 404: "Not found"}.get(status, "Try later")
            body = json.dumps({"error": {"code": status, "message": message}}).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

        def log_message(self, *_):
            """Says nothing."""

    with listening(Handler) as port:
        try:
            yield port
        finally:
            over.set()


def environment(port: int) -> dict[str, str]:
    """What sends gcsfs and TensorStore to that port, with a token that nobody checks."""
    place = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": place,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "TENSORSTORE_GCS_HTTP_URL": place,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "no_proxy": "127.0.0.1",
    }
