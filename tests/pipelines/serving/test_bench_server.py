"""A running server's figures are those of its answers, and nothing of a key is told."""

import contextlib
import json
from http.server import BaseHTTPRequestHandler

import pytest

from common.errors import EyasError, MachineError
from pipelines.serving import bench
from pipelines.serving.bench import run
from pipelines.serving.bench_table import table
from pipelines.serving.config import BenchServerConfig
from tests.listening import listening
from tests.pipelines.regenerate.chat_server import chat_server
from tests.pipelines.serving.model_server import Model, handler


@contextlib.contextmanager
def model_at(kind="vllm", drafts=True):
    """(its address, what it was asked)"""
    seen = []
    with listening(handler(Model(drafts, kind), seen)) as port:
        yield f"http://127.0.0.1:{port}", seen


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_throughput_latency_and_acceptance_are_measured_at_every_load(tmp_path, kind):
    out = tmp_path / "bench.json"
    with model_at(kind) as (url, seen), model_at(drafts=False) as (alone, _):
        config = BenchServerConfig(
            f"{url}/v1", without=alone, concurrency=(1, 4), requests=6, max_tokens=20, out=str(out)
        )
        found = run(config)
    assert [level["concurrency"] for level in found["levels"]] == [1, 4]
    for level, count in zip(found["levels"], (6, 8), strict=True):
        its = level["with"]
        assert level["requests"] == count
        assert its["tokens"] == 20 * count
        assert its["tokens_per_s"] == pytest.approx(its["tokens"] / its["seconds"])
        assert 0 < its["first_token_median_s"] <= its["latency_median_s"] <= its["latency_p90_s"]
        assert its["acceptance_length"] == 2.0
        assert level["without"]["acceptance_length"] is None
        assert level["speed_up"] == its["tokens_per_s"] / level["without"]["tokens_per_s"]
    requests = [request for request, _ in seen]
    assert all(request["stream"] and request["temperature"] == 0 for request in requests)
    assert all(bool(r.get("return_spec_tokens_details")) is (kind == "sglang") for r in requests)
    assert len({json.dumps(request["messages"]) for request in requests}) > 4
    assert json.loads(out.read_text()) == found
    text = table(found)
    assert "2.000" in text
    assert "not told" in text


def test_conversations_ask_their_first_questions(tmp_path):
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]
    turns += [{"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    with model_at() as (url, seen):
        run(BenchServerConfig(url, data=(str(data),), concurrency=(1,), requests=2, max_tokens=4))
    assert all(request["messages"] == turns[:2] for request, _ in seen)


@pytest.mark.parametrize("url", ["http://a..b/v1", "http://0/v1"])
def test_an_address_that_is_none_is_a_mistake(url):
    with pytest.raises(ValueError, match=r"must be an address|it is no address") as error:
        run(BenchServerConfig(url, served_model="x"))
    assert getattr(error.value, "exit_code", 2) == 2


def test_figures_never_take_the_place_of_questions(tmp_path):
    data = tmp_path / "chats.json"
    data.write_text(json.dumps([{"question": "One?", "answer": "1"}]))
    with pytest.raises(EyasError, match="name another place"):
        run(BenchServerConfig("http://127.0.0.1:1", data=(str(data),), out=str(data)))


def test_a_key_goes_to_its_server_alone_and_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("EYAS_API_KEY", "secret-one")
    monkeypatch.setenv("EYAS_API_KEY_2", "secret-two")
    with model_at() as (url, seen), model_at() as (alone, others):
        run(BenchServerConfig(url, without=alone, concurrency=(1,), requests=2, max_tokens=4))
    assert {headers["Authorization"] for _, headers in seen} == {"Bearer secret-one"}
    assert {headers["Authorization"] for _, headers in others} == {"Bearer secret-two"}
    with pytest.raises(EyasError, match="the key in EYAS_API_KEY is also part of an address"):
        run(BenchServerConfig(f"{url}/secret-one/v1"))
    with chat_server(lambda request: "401") as server:
        config = BenchServerConfig(server.url, served_model="x", concurrency=(1,), requests=2, max_tokens=4)
        with pytest.raises(
            EyasError, match=r"answers 401: bad Bearer \(the key\); check the address"
        ) as caught:
            run(config)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("404", EyasError, "answers 404: .*; check the address"),
        ("429", MachineError, "answers 429: .*; run the same command again when it answers"),
        ("500", MachineError, "answers 500"),
        ("503", MachineError, "answers 503"),
        ("html", EyasError, "must stream chat completions"),
        ("no choices", EyasError, "must stream chat completions"),
        ("close", MachineError, "Server disconnected"),
        ("cut", MachineError, "http://127.0.0.1"),
        ("hang", MachineError, r"no whole answer in 1 seconds \(--timeout\)"),
    ],
)
def test_a_server_that_fails_ends_it_in_one_line(way, error, message):
    with chat_server(lambda request: way) as server:
        config = BenchServerConfig(
            server.url, served_model="x", concurrency=(2,), requests=4, max_tokens=4, timeout=1.0
        )
        with pytest.raises(error, match=message) as caught:
            run(config)
    assert "\n" not in str(caught.value)


def talking(events=None, page="", told=None):
    """A server that streams these events, with this page of metrics, or one page after the other."""
    usage = {"choices": [], "usage": {"completion_tokens": 2}, **(told or {})}
    said = {"choices": [{"delta": {"content": "ab"}, "finish_reason": "length"}]}
    pages = iter([page] * 9 if isinstance(page, str) else page)
    body = events or b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in (said, usage))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(next(pages).encode() if self.path == "/metrics" else b"")

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self._send(body)

        def _send(self, data):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *_):
            """Says nothing."""

    return listening(Handler)


def measured(port, **changed):
    how = {"served_model": "x", "concurrency": (1,), "requests": 2, "max_tokens": 4, "timeout": 5.0} | changed
    return run(BenchServerConfig(f"http://127.0.0.1:{port}", **how))["levels"][0]["with"]


def test_a_stream_is_looked_through_once_until_it_says_something(monkeypatch):
    """Else a server that sends a sign of life now and then costs the square of what it sends."""
    looked, plain = [], bench._says_something
    monkeypatch.setattr(bench, "_says_something", lambda body: looked.append(bytes(body)) or plain(body))
    silent = b"data: %s\n\n" % json.dumps({"choices": [{"delta": {"role": "assistant"}}]}).encode()
    said = {
        "choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 1},
    }
    events = silent * 20_000 + b"data: %s\n\n" % json.dumps(said).encode()
    with talking(events) as port:
        assert measured(port)["tokens"] == 2
    assert sum(map(len, looked)) == 3 * len(events)  # a warm-up and two requests


COUNTER = "vllm:spec_decode_num_"


@pytest.mark.parametrize(
    ("page", "length"),
    [
        (f"{COUNTER}drafts_total x\n{COUNTER}accepted_tokens_total 7", None),
        (f"{COUNTER}drafts_total nan\n{COUNTER}accepted_tokens_total inf", None),
        (f"{COUNTER}drafts_total -3\n{COUNTER}accepted_tokens_total 1e300", None),
        ([f"{COUNTER}drafts_total 9\n{COUNTER}accepted_tokens_total 9", f"{COUNTER}drafts_total 1"], None),
        (
            [
                "up 1",
                f'{COUNTER}drafts_total 2\n{COUNTER}accepted_tokens_per_pos_total{{position="{9**30}"}} 1',
            ],
            1.0,
        ),
        (["up 1", f"{COUNTER}drafts_total 2\n{COUNTER}accepted_tokens_total 3"], 2.5),
        (["", f"{COUNTER}drafts_total 2\n{COUNTER}accepted_tokens_total 3"], None),
        ("\0\n\ud7ff" * 99, None),
    ],
)
def test_of_rubbish_among_the_metrics_no_figure_is_made(page, length):
    with talking(page=page) as port:
        assert measured(port)["acceptance_length"] == length


@pytest.mark.parametrize("told", [[], 7, {"spec_tokens_details": 7}, {"spec_tokens_details": {}}, "x"])
@pytest.mark.parametrize(
    "counts", [{}, {"spec_verify_ct": "2"}, {"spec_verify_ct": -1}, {"spec_verify_ct": [1]}]
)
def test_of_rubbish_about_drafts_no_figure_is_made(told, counts):
    if isinstance(told, dict) and told.get("spec_tokens_details") == {}:
        told = {"spec_tokens_details": counts}
    with talking(told={"sglext": told}) as port:
        assert measured(port)["acceptance_length"] is None


@pytest.mark.parametrize(
    "events",
    [
        *(b"data: %s\n\n" % (b"[" * n) for n in (1, 100_000)),
        *(
            b'data: {"choices": %s}\n\n' % x
            for x in (b"7", b'{"a": 1}', b'"abc"', b"[[1]]", b'[{"delta": 7}]')
        ),
        b"data: " + b"9" * 200_000,
        b" " * (3 << 20),
        b"data: \xff\n\n",
    ],
)
def test_rubbish_for_an_answer_ends_it_in_one_line(events, monkeypatch):
    monkeypatch.setattr(bench, "LARGEST", 1 << 20)
    with talking(events) as port, pytest.raises(EyasError, match="must stream chat completions"):
        measured(port)


def test_a_place_that_cannot_be_a_file_is_refused_before_anybody_is_asked(tmp_path):
    with pytest.raises(EyasError, match="is a folder where a file is to be written"):
        measured(9, out=str(tmp_path))
    (tmp_path / "a").touch()
    with pytest.raises(EyasError, match="is a file; name another place"):
        measured(9, out=f"{tmp_path}/a/b.json")


def test_who_serves_several_models_or_nothing_is_asked_for_a_name():
    with (
        chat_server() as server,
        pytest.raises(EyasError, match=r"does not say what it serves.*--served-model"),
    ):
        run(BenchServerConfig(server.url, concurrency=(1,), requests=2))
    with pytest.raises(MachineError, match=r"http://127\.0\.0\.1:9/v1: .*; see that a server runs there"):
        run(BenchServerConfig("http://127.0.0.1:9/v1", concurrency=(1,), requests=2))
    with pytest.raises(ValueError, match="endpoint 2 must be an address"):
        BenchServerConfig("http://localhost:8000", without="localhost:8001")
