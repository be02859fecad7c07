"""A bucket in memory that speaks as much of Google Cloud Storage's JSON API as gcsfs and TensorStore use."""

import hashlib
import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

from tests.listening import listening


class Bucket:
    """{name: (generation, bytes)}; every change has a generation of its own."""

    def __init__(self):
        self.requests: list[str] = []  # "GET name"
        self.sent = 0  # bytes of objects
        self.objects: dict[str, tuple[int, bytes]] = {}
        self._lock, self._last = threading.Lock(), 1000

    def put(self, name: str, data: bytes, wanted: str | None) -> bool:
        """False, with nothing written, unless the object's generation is `wanted` ("0": there is none)."""
        with self._lock:
            if wanted is not None and int(wanted) != self.objects.get(name, (0, b""))[0]:
                return False
            self._last += 1
            self.objects[name] = (self._last, data)
            return True

    def describe(self, name: str) -> dict:
        generation, data = self.objects[name]
        sums = {"crc32c": google_crc32c.value(data).to_bytes(4, "big"), "md5Hash": hashlib.md5(data).digest()}
        described = {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(data))}
        return (
            described | {"generation": str(generation)} | {k: b64encode(v).decode() for k, v in sums.items()}
        )


@contextmanager
def serving(bucket: Bucket) -> Iterator[int]:
    """The port of a server whose bucket `bucket` is this one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            place = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(place.query).items()}
            _, found, name = place.path.partition("/b/bucket/o")
            name = unquote(name.removeprefix("/"))
            bucket.requests.append(f"GET {name}")
            if not found:
                return self._json({"kind": "storage#bucket", "name": "bucket"})
            if not name:
                return self._list(query.get("prefix", ""), query.get("delimiter"), query)
            if name not in bucket.objects:
                return self._json({"error": {"code": 404, "message": "Not Found"}}, 404)
            generation, data = bucket.objects[name]
            if query.get("ifGenerationNotMatch") == str(generation):
                return self._send(b"", 304, {})
            if query.get("alt") != "media":
                return self._json(bucket.describe(name))
            headers, status = {"x-goog-generation": str(generation)}, 200
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or ""):
                start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
                headers["content-range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
                data, status = data[start:stop], 206
            elif wanted := re.fullmatch(r"bytes=-(\d+)", self.headers.get("range") or ""):
                start = max(0, len(data) - int(wanted[1]))
                headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            bucket.sent += len(data)
            self._send(data, status, headers)

        def do_POST(self):
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            name = query.get("name")
            if query.get("uploadType") == "multipart":
                limit = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["content-type"])[1].encode()
                _, about, content, _ = body.split(b"--" + limit)
                name = json.loads(about.partition(b"\n\n")[2] or about.partition(b"\r\n\r\n")[2])["name"]
                body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
                body = body.removesuffix(b"\n").removesuffix(b"\r")
            bucket.requests.append(f"POST {name}")
            if not bucket.put(name, body, query.get("ifGenerationMatch")):
                return self._json({"error": {"code": 412, "message": "Precondition Failed"}}, 412)
            self._json(bucket.describe(name))

        def _list(self, prefix: str, delimiter: str | None, query: dict) -> None:
            names = sorted(name for name in bucket.objects if name.startswith(prefix))
            deeper = {name: name[len(prefix) :].partition(delimiter or "\0") for name in names}
            folders = sorted({prefix + first + cut for first, cut, _ in deeper.values() if cut})
            items = [bucket.describe(name) for name in names if not deeper[name][1]]
            self._json({"kind": "storage#objects", "items": items, "prefixes": folders})

        def _json(self, value: dict, status: int = 200) -> None:
            self._send(json.dumps(value).encode(), status, {"content-type": "application/json"})

        def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Says nothing."""

    with listening(Handler) as port:
        yield port
