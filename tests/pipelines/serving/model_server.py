"""A server that answers as vLLM and SGLang do; also a program: `python model_server.py serve MODEL …`.

Its answers are a function of the prompt alone. MODEL names what it does: "good", or a way to fail.
"""

import json
import pathlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

K = 3


def tokens_of(prompt: list[int], count: int) -> list[int]:
    """The answer to a prompt: it counts on from its last token."""
    return [(prompt[-1] + 1 + n) % 64 for n in range(count)]


class Model:
    """Counts drafts as a head would that is always right at the first place, never at the second."""

    def __init__(self, drafts: bool, kind: str = "vllm"):
        self.lock, self.drafts, self.kind = threading.Lock(), drafts, kind
        self.rounds = 0.0

    def drafted(self, tokens: int) -> None:
        with self.lock:
            self.rounds += tokens / 2

    def metrics(self) -> str:
        if not self.drafts or self.kind != "vllm":
            return "python_gc_objects_collected_total 1.0\n"
        name, labels = "vllm:spec_decode_num", 'engine="0",model_name="target"'
        by_position = [self.rounds, 0.0, 0.0]
        lines = [
            f"# TYPE {name}_drafts_total counter",
            f"{name}_drafts_total{{{labels}}} {self.rounds}",
            f"{name}_drafts_created{{{labels}}} 1.79e+09",
            f"{name}_draft_tokens_total{{{labels}}} {K * self.rounds}",
            f"{name}_accepted_tokens_total{{{labels}}} {self.rounds}",
        ]
        for place, value in enumerate(by_position):
            lines.append(f'{name}_accepted_tokens_per_pos_total{{{labels},position="{place}"}} {value}')
        return "\n".join(lines) + "\n"


def handler(model: Model, seen: list | None = None):
    """Of requests; what they were is added to `seen`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            pages = {"/health": "", "/metrics": model.metrics()}
            pages["/v1/models"] = json.dumps({"data": [{"id": "target"}]})
            if model.kind == "sglang":
                pages["/get_server_info"] = json.dumps({"speculative_algorithm": "EAGLE3"})
            self._send(200 if self.path in pages else 404, pages.get(self.path, "").encode())

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if seen is not None:
                seen.append((request, dict(self.headers)))
            if request["model"] != "target":
                return self._send(404, b'{"error": {"message": "no such model"}}')
            model.drafted(request["max_tokens"])
            if self.path.endswith("/completions") and "prompt" in request:
                ids = tokens_of(request["prompt"], request["max_tokens"])
                return self._send(200, json.dumps({"choices": [{"token_ids": ids}]}).encode())
            self._send(200, self._stream(request), "text/event-stream")

        def _stream(self, request):
            count = request["max_tokens"]
            deltas = [{"role": "assistant", "content": ""}, *({"content": "ab "} for _ in range(count // 2))]
            events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
            events.append({"choices": [{"delta": {}, "finish_reason": "length"}]})
            events.append({"choices": [], "usage": {"completion_tokens": count}})
            if request.get("return_spec_tokens_details"):
                told = {"spec_verify_ct": count // 2, "spec_num_correct_drafts": count // 2}
                events[-1]["sglext"] = {"spec_tokens_details": told}
            return (
                "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"
            )

        def _send(self, status, body, kind="application/json"):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Says nothing."""

    return Handler


def main(arguments: list[str]) -> None:
    way, port = arguments[1].rsplit("/", 1)[-1], int(arguments[arguments.index("--port") + 1])
    print(f"serving {way}", flush=True)
    if way == "broken":
        print("ValueError: no such weights\n", flush=True)
        sys.exit(3)
    if way == "silent":
        time.sleep(600)
    config = pathlib.Path(arguments[1]) / "config.json"
    itself = config.exists() and "speculators_config" in json.loads(config.read_text())
    model = Model(itself or "--speculative-config" in arguments)
    ThreadingHTTPServer(("127.0.0.1", port), handler(model)).serve_forever(0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
