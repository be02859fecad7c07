"""Regenerating answers: what is asked and written, and that no server's failure loses or doubles any."""

import email.utils
import errno
import json
import os
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EyasError, MachineError, RestartError
from common.lock import locked_file
from common.store import Store
from dump.config import PrepareConfig
from dump.data_files import find_files
from dump.prepare import run as prepare
from pipelines.regenerate import answers, endpoint, work
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.run import run
from tests.dump.chats import write_model
from tests.pipelines.regenerate.chat_server import ANSWERS, CALL, RAW, RUBBISH, chat_server, good

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def old(text="the data's own answer"):
    return {"role": "assistant", "content": text}


def write_data(path, count=20):
    """Conversations of one to three questions, half with a system turn."""
    with open(path, "w") as file:
        for n in range(count):
            turns = [turn for k in range(1 + n % 3) for turn in (user(f"question {n}.{k}?"), old())]
            record = {"id": f"chat{n}", "messages": [SYSTEM] * (n % 2) + turns}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST", 0.01)
    monkeypatch.setattr(endpoint, "_LONGEST", 0.05)
    monkeypatch.setattr(endpoint, "_STAGGER", 0.3)
    monkeypatch.setattr(work, "_TICK", 0.02)
    for name in [name for name in os.environ if name.startswith("EYAS_API_KEY")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path):
    data = write_data(tmp_path / "chats.jsonl")
    out = str(tmp_path / "answers.jsonl")
    return RegenerateConfig((data,), ("http://127.0.0.1:1",), "tiny", out, concurrency=4, timeout=5.0)


def ask(config, *servers, **changes):
    return run(replace(config, endpoint=tuple(server.url for server in servers), **changes))


def lines(config):
    return [json.loads(line) for line in Path(config.out).read_bytes().splitlines()]


def record(config):
    return json.loads((Path(config.out).parent / "answers.settings.json").read_text())


@pytest.fixture
def expected(config, tmp_path):
    """The bytes of an uninterrupted run without a fault."""
    with chat_server() as server:
        ask(replace(config, out=str(tmp_path / "expected.jsonl")), server)
    return (tmp_path / "expected.jsonl").read_bytes()


def only_one(config, *turns, **fields):
    Path(config.data[0]).write_text(json.dumps({"id": "one", "messages": turns} | fields))
    return config


def test_each_question_is_asked_behind_the_targets_own_answers(config):
    with chat_server() as server:
        found = ask(config, server, temperature=0.5, top_p=0.9, top_k=3, extra='{"min_p": 0.1}')
    assert found["outcomes"] == {"answered": 20}
    assert found["tokens"] == 5 * len(server.requests) == 5 * sum(1 + n % 3 for n in range(20))
    by_messages = {json.dumps(request["messages"]): request for request in server.requests}
    assert len(by_messages) == len(server.requests)
    for n, line in enumerate(lines(config)):
        assert (line["id"], line["number"]) == (f"chat{n}", n)
        asked, expected = [], [SYSTEM] * (n % 2)
        for message in line["messages"]:
            if message["role"] == "assistant":
                request = by_messages[json.dumps(expected)]
                assert message == good(request)["message"] | {"finish_reason": "stop"}
                fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "max_tokens": 4096}
                assert fields.items() <= request.items()
                assert (request["model"], request["stream"]) == ("tiny", False)
            elif message["role"] == "user":
                asked.append(message)
                expected = [*expected, message]
                continue
            expected = [*expected, {"role": message["role"], "content": message["content"]}] * (
                message["role"] == "assistant"
            ) or expected
        assert asked == [user(f"question {n}.{k}?") for k in range(1 + n % 3)]
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == len(server.requests), "every answer has its own"
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(config, expected):
    with chat_server() as one, chat_server() as two:
        ask(config, one, two, concurrency=3)
        assert Path(config.out).read_bytes() == expected
        assert one.requests
        assert two.requests
        os.unlink(config.out)
        os.unlink(config.out.replace(".jsonl", ".settings.json"))
        ask(config, one, seed=1)
    assert Path(config.out).read_bytes() != expected


def test_no_more_requests_are_in_flight_than_wanted(config):
    with chat_server(delay=0.02) as server:
        ask(config, server, concurrency=3)
        assert server.most == 3


@pytest.mark.parametrize(
    ("way", "keep", "outcome", "more"),
    [
        ("length", False, "truncated", None),
        ("length", True, "truncated", {"finish_reason": "length"}),
        ("half thought", True, "truncated", {"content": "", "reasoning": "hm", "finish_reason": "length"}),
        ("filter", True, "refused", None),
        ("refusal", False, "refused", None),
        ("empty", False, "empty", None),
        ("null", False, "empty", None),
        ("thought", False, "empty", None),
        ("bad call", False, "unreadable", None),
        ("call", False, "called", {"tool_calls": [CALL], "content": "", "finish_reason": "tool_calls"}),
        ("parts", False, "answered", {"content": "in parts"}),
        ("reasoning", False, "answered", {"reasoning_content": "so it is", "reasoning": "so it is"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_is_decides_about_its_conversation(config, way, keep, outcome, more, stream):
    assert way in ANSWERS
    turns = user("a?"), old(), user("b?"), old(), user("c?")
    with chat_server(lambda request: way if len(request["messages"]) == 3 else None) as server:
        found = ask(only_one(config, *turns), server, truncated="keep" if keep else "drop", stream=stream)
    assert found["outcomes"] == {outcome: 1}
    assert found["tokens"] == 5 * len(server.requests)
    (line,) = lines(config)
    assert line["outcome"] == outcome
    first, second = user("a?"), user("b?")
    assert [line["messages"][0], line["messages"][2]] == [first, second]
    assert line["messages"][1]["finish_reason"] == "stop"
    assert len(line["messages"]) == (6 if outcome == "answered" else 3 + (more is not None))
    if more:
        assert more.items() <= line["messages"][3].items()


def test_reasoning_is_kept_and_not_sent_back(config):
    with chat_server(lambda request: "reasoning") as server:
        ask(only_one(config, user("a?"), old(), user("b?")), server)
    assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1].keys() == {"role", "content"}


def test_tools_are_told_and_conversations_whose_tools_are_not_defined_are_left_out(config):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    result = {"role": "tool", "content": "12"}
    turns = [user("When?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, old()]
    with chat_server() as server:
        found = ask(only_one(config, *turns, tools=[tool]), server)
        assert [request["tools"] for request in server.requests] == [[tool]]
        assert lines(config)[0]["tools"] == [tool]
        assert found["data"] == {"read": 1}
        with pytest.raises(EyasError, match=r"none of 1 records asks anything \(1 tools\)"):
            ask(only_one(replace(config, out=config.out + "2.jsonl"), *turns), server)


def test_questions_of_any_shape_and_max_conversations(config):
    with chat_server() as server:
        records = {"prompt": "a?", "id": "x"}, {"question": "b?", "answer": "c"}, {"prompt": "z?"}, {"n": 1}
        Path(config.data[0]).write_text("\n".join(map(json.dumps, records)))
        found = ask(config, server, max_conversations=2)
        assert [line["id"] for line in lines(config)] == ["x", "chats.jsonl#1"]
        assert found["data"] == {"read": 2}


FAULTS = ["500", "502", "503", "429", "429 0.05", "429 soon", "429 Thu, 01 Jan 1970 00:00:00 GMT", "408"]
FAULTS += ["close", "cut", "gzip", "junk", "huge", "hang", "slow", "drip", *RUBBISH, *RAW]


def now_and_then(faults, seed=0, share=0.3):
    """Good answers, and each of the faults now and then; some twice in a row for one question."""
    draw, waiting = random.Random(seed), list(faults)
    draw.shuffle(waiting)

    def choose(request):
        return waiting.pop() if waiting and draw.random() < share else None

    choose.waiting = waiting
    return choose


def test_whatever_a_server_does_now_and_then_nothing_is_lost_or_doubled(
    config, expected, monkeypatch, tmp_path
):
    monkeypatch.setattr(endpoint, "_LARGEST", 1 << 20)
    choose = now_and_then(FAULTS, share=0.6)
    with chat_server(choose) as server, chat_server(now_and_then(FAULTS[::-1], 1)) as other:
        found = ask(config, server, other, timeout=0.8)
    assert found["outcomes"] == {"answered": 20}
    assert Path(config.out).read_bytes() == expected
    assert len(FAULTS) - len(choose.waiting) > 5
    assert record(config)["complete"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", FAULTS)
def test_each_fault_alone_is_tried_again(config, way, stream, monkeypatch):
    monkeypatch.setattr(endpoint, "_LARGEST", 1 << 20)
    count = Counter()

    def choose(request):
        count[request["messages"][-1]["content"]] += 1
        return way if count[request["messages"][-1]["content"]] == 1 else None

    with chat_server(choose) as server:
        found = ask(only_one(config, user("a?"), old(), user("b?")), server, timeout=0.4, stream=stream)
    assert found["outcomes"] == {"answered": 1}
    assert count == ({"a?": 1, "b?": 1} if way == "drip" else {"a?": 2, "b?": 2})


def test_retry_after_is_honoured_by_all_that_ask_that_server(config):
    times, refused = [], []

    def choose(request):
        times.append(time.monotonic())
        if len(times) == 6:
            refused.append(time.monotonic())
            return "429 0.5"
        return None

    with chat_server(choose, delay=0.03) as server:
        ask(config, server)
    later = [t for t in times if t > refused[0] + 0.1]
    assert later
    assert min(later) > refused[0] + 0.45


def test_retry_after_is_honoured_by_those_who_wait_for_work(config):
    times = []

    def choose(request):
        times.append(time.monotonic())
        return {2: "429 0.5", 3: "401"}.get(len(times))

    only_one(config, user("a?"), old(), user("b?"))
    with chat_server(choose, delay=0.02) as server, pytest.raises(EyasError, match="401"):
        ask(config, server, concurrency=16)
    assert len(times) == 3, "who was idle does not send a wrong key again"
    assert times[2] - times[1] > 0.45


def test_a_server_that_fails_for_good_is_named_and_the_others_go_on(config, expected, capfd):
    asked = Counter()

    def dies(request):
        asked["all"] += 1
        return "401" if asked["all"] > 5 else None

    with chat_server(dies) as server, chat_server() as other:
        found = ask(config, server, other)
        assert f"{server.url} is given up: 401" in capfd.readouterr().err
    assert found["outcomes"] == {"answered": 20}
    assert Path(config.out).read_bytes() == expected


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ("401", EyasError, "401: bad None; give its key in EYAS_API_KEY.*; mend that"),
        ("404", EyasError, "404: .*check the address"),
        ("301", EyasError, "301: .*check the address"),
        ("400", EyasError, "it rejects a plain question too .400: bad None"),
        ("html", EyasError, "none of 8 replies was an answer .the reply is not JSON"),
        ("500", RestartError, r"nothing answered for \d seconds .500: bad None.*asks them again"),
        ("close", RestartError, r"nothing answered for \d seconds"),
        ("429 3600", RestartError, "it asks to wait 3600 seconds, longer than --patience"),
    ],
)
def test_where_all_servers_fail_the_one_line_says_why_and_nothing_is_recorded(config, way, error, message):
    with chat_server(lambda request: way) as server:
        with pytest.raises(
            error, match=f"^20 of 20 conversations have no answer yet .{server.url}: {message}"
        ):
            ask(config, server, patience=0.5)
        assert lines(config) == []
        server.choose = lambda request: None
        assert ask(config, server)["outcomes"] == {"answered": 20}


def test_a_first_conversation_that_is_rejected_is_told_from_a_server_that_rejects_all(config):
    with chat_server(lambda r: None if r["messages"][-1]["content"] == "Hello" else "413") as server:
        assert ask(config, server)["outcomes"] == {"rejected": 20}
    with chat_server(lambda r: "413" if "question 0.0?" in str(r["messages"]) else None) as server:
        config = replace(config, out=config.out + ".2.jsonl")
        assert ask(config, server)["outcomes"] == {"answered": 19, "rejected": 1}
        assert len(server.requests) == 2 + sum(1 + n % 3 for n in range(1, 20)), "and a plain question"


def test_a_stream_gives_the_same_answers(config, expected):
    with chat_server() as server:
        assert ask(config, server, stream=True)["tokens"] == 5 * len(server.requests)
        assert server.requests[0]["stream_options"] == {"include_usage": True}
    told = [line | {"messages": []} for line in lines(config)]
    assert told == [json.loads(line) | {"messages": []} for line in expected.splitlines()]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None), ("7", 7), ("0.5", 0.5), ("-3", 0), ("1e99", 1e9), ("nan", 0), ("soon", None),
        ("", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("Thu, 99 Jan", None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(text, seconds):
    assert endpoint._seconds(text) == seconds
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < endpoint._seconds(soon) < 31


def test_no_server_at_all(config):
    with pytest.raises(RestartError, match=r"http://127\.0\.0\.1:1: nothing answered for .*Cannot connect"):
        run(replace(config, patience=0.2))


def test_a_conversation_that_a_server_rejects_is_recorded_and_one_that_fails_again_and_again_is_not(
    config, capfd
):
    def choose(request):
        first = request["messages"][-1]["content"]
        return {"question 3.0?": "400", "question 4.0?": "500"}.get(first)

    with chat_server(choose, delay=0.01) as server:
        with pytest.raises(RestartError, match=r"^1 of 20 .*(tried again and again|nothing answered).*500"):
            ask(config, server, patience=2.0)
        (line,) = [line for line in lines(config) if line["outcome"] == "rejected"]
        assert line["messages"] == [SYSTEM, user("question 3.0?")]
        assert line["reason"] == "400: bad None"
        assert not record(config)["complete"]
        before = len(server.requests)
        server.choose = lambda request: None
        found = ask(config, server)
        assert found["outcomes"] == {"answered": 19, "rejected": 1}
        assert len(server.requests) == before + 2, "only what had no outcome is asked again"
    assert capfd.readouterr().err.count("a conversation is rejected: 400: bad None") == 1


def test_a_line_that_is_taken_out_is_asked_again(config, expected):
    with chat_server() as server:
        ask(config, server)
        kept = expected.splitlines(keepends=True)
        Path(config.out).write_bytes(b"".join(kept[:3] + kept[4:]))
        server.requests.clear()
        ask(config, server)
        assert [r["messages"][-1]["content"] for r in server.requests] == ["question 3.0?"]
    assert Path(config.out).read_bytes() == expected


@pytest.mark.parametrize("left", range(5))
def test_a_file_of_any_length_is_continued_to_the_same_bytes(config, expected, left):
    with chat_server() as server:
        ask(config, server)
        cut = random.Random(left).randrange(len(expected)) if left else 0
        Path(config.out).write_bytes(expected[:cut])
        server.requests.clear()
        ask(config, server)
        done = expected[:cut].count(b"\n")
        assert len(server.requests) == sum(1 + n % 3 for n in range(done, 20))
    assert Path(config.out).read_bytes() == expected


def test_an_answered_file_is_left_as_it_is(config, capfd):
    with chat_server() as server:
        first = ask(config, server)
        before = Path(config.out).read_bytes(), record(config)
        assert run(config) == first, "nobody is asked"
    assert "has all answers" in capfd.readouterr().err
    assert record(config)["settings"] == before[1]["settings"]
    assert Path(config.out).read_bytes() == before[0]


def test_another_run_is_refused_by_what_differs(config):
    with chat_server() as server:
        ask(config, server)
        before = Path(config.out).read_bytes()
        for field, value, named in (
            ("seed", 1, "seed: 0 there, 1 here"),
            ("served_model", "other", 'request.model: "tiny" there, "other" here'),
            ("temperature", 0.0, "request.temperature: null there, 0.0 here"),
            ("truncated", "keep", 'truncated: "drop" there, "keep" here'),
            ("max_tokens", 7, "request.max_tokens: 4096 there, 7 here"),
        ):
            with pytest.raises(EyasError, match=f"was answered in another way: {named}; name another --out"):
                ask(config, server, **{field: value})
        write_data(config.data[0], 21)
        with pytest.raises(EyasError, match="was answered in another way: data"):
            ask(config, server)
        assert Path(config.out).read_bytes() == before


def test_what_answered_nothing_does_not_bind(config):
    with chat_server(lambda request: None if request["model"] == "tiny" else "404") as server:
        with pytest.raises(EyasError, match="404"):
            ask(config, server, served_model="tyni")
        assert ask(config, server)["outcomes"] == {"answered": 20}
        assert record(config)["settings"]["request"]["model"] == "tiny"


def test_a_server_without_https(config):
    with chat_server() as server, pytest.raises(EyasError, match="it speaks no https"):
        run(replace(config, endpoint=(server.url.replace("http:", "https:"),)))


def test_a_file_that_is_not_of_a_run_is_left_alone(config):
    Path(config.out).write_text("years of work\n")
    with pytest.raises(EyasError, match=r"answers\.jsonl is there, without answers\.settings\.json"):
        run(config)
    assert Path(config.out).read_text() == "years of work\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("years of work", "line 2 is not JSON"),
        ("{}", "line 2 has no number"),
        ('{"number": "0", "outcome": "answered", "tokens": 0}', 'line 2: number is "0"'),
        ('{"number": 99, "outcome": "answered", "tokens": 0}', "there is no conversation 99 in the data"),
        ('{"number": 0, "outcome": "answered", "tokens": 0}', "conversation 0 is there already"),
        ('{"number": 1, "outcome": "SECRET text", "tokens": 0}', "line 2: outcome is"),
    ],
)
def test_a_line_that_is_none_of_ours_is_named_and_nothing_is_asked(config, line, message):
    with chat_server() as server:
        ask(config, server)
        first = Path(config.out).read_text().splitlines()[0]
        Path(config.out).write_text(f"{first}\n{line}\n")
        server.requests.clear()
        with pytest.raises(EyasError, match=message):
            ask(config, server)
        assert not server.requests


def test_two_at_once_are_refused(config):
    with locked_file(config.out), pytest.raises(EyasError, match=r"answers\.jsonl is in use by process"):
        run(config)


def test_keys_are_sent_to_their_servers_and_written_nowhere(config, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("EYAS_API_KEY", "sk-common-1234")
    monkeypatch.setenv("EYAS_API_KEY_2", "sk-second-5678")
    with chat_server(lambda r: "503") as one, chat_server() as two:
        ask(config, one, two, patience=5.0)
        assert {h["Authorization"] for h in one.headers} == {"Bearer sk-common-1234"}
        assert {h["Authorization"] for h in two.headers} == {"Bearer sk-second-5678"}
        printed = capfd.readouterr()
        assert "503: bad Bearer (the key)" in printed.err
    with chat_server(lambda r: "401") as one, pytest.raises(EyasError) as error:
        ask(replace(config, out=str(tmp_path / "b.jsonl")), one)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    shown = [printed.out, printed.err, str(error.value), repr(error.value)]
    assert len(written) > 5
    assert not any(b"sk-" in data for data in written)
    assert not any("sk-" in text for text in shown)


def test_a_key_that_no_header_can_have_is_not_told(config, monkeypatch):
    monkeypatch.setenv("EYAS_API_KEY", "sk-1\nX-Evil: 1")
    with pytest.raises(EyasError, match=r"^the environment's EYAS_API_KEY holds characters") as error:
        run(config)
    assert "sk-1" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("endpoint", ("http://user:secret@host/v1",), "endpoint 1 must be an address without user, password"),
        ("endpoint", ("http://host/v1?key=secret",), "endpoint 1 must be an address without user, password"),
        ("endpoint", ("http://a/v1", "http://b/v1#secret"), "endpoint 2 must be an address without"),
        ("endpoint", ("secret:8000",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", ("http://host:secret",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", ("http://a/v1", "http://a/v1/"), "an endpoint is named twice"),
        ("endpoint", (), "endpoint must be a tuple of at least one text"),
        ("out", "answers.json", "out='answers.json' must be a file whose name ends in .jsonl"),
        ("out", "gs://bucket/answers.jsonl", "must be a local file, which grows by lines"),
        ("extra", "[]", "must be an object of JSON"),
        ("extra", "{", "must be an object of JSON"),
        ("extra", '{"x": NaN}', "must be an object of JSON"),
        ("extra", '{"seed": 3}', "must not have seed"),
        ("top_p", 1.5, "top_p=1.5 must be"),
        ("served_model", "", "served_model='' must be"),
    ],
)
def test_what_cannot_be_is_refused_without_repeating_a_secret(config, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(config, **{field: value})
    assert "secret" not in str(error.value)


def test_prepare_reads_the_answers_and_holds_the_same_chats_out(config, tmp_path):
    def choose(request):
        n = int(request["messages"][-1]["content"].split()[1].split(".")[0])
        return {3: "length", 5: "refusal", 7: "empty", 8: "reasoning"}.get(n)

    write_data(config.data[0], 60)
    with chat_server(choose) as server:
        found = ask(config, server, truncated="keep")
    assert found["outcomes"] == {"answered": 57, "empty": 1, "refused": 1, "truncated": 1}
    model = str(write_model(tmp_path / "model"))
    splits = []
    for number, data in enumerate((config.data[0], config.out)):
        store = str(tmp_path / f"store{number}")
        rows = prepare(PrepareConfig((data,), model, store, length=1024, holdout=0.2))
        splits.append({line["id"]: line["split"] for line in Store.open(store).index().to_pylist()})
    assert rows["counts"]["turns_cut_off"] == 1
    assert rows["counts"]["dropped_no_assistant"] == 2
    assert splits[1].keys() == splits[0].keys() - {"chat5", "chat7"}
    assert splits[1].items() <= splits[0].items()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("answers.jsonl", "answers.settings.json"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    assert find_files((str(folder),)) == [str(folder / "answers.jsonl")]


def test_a_full_disk_leaves_whole_lines(config, expected, monkeypatch):
    plain, lock = os.pwrite, threading.Lock()
    room = [len(expected) // 2]

    def pwrite(file, data, start):
        with lock:
            if room[0] <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = plain(file, data[: room[0]], start)
            room[0] -= written
            return written

    with chat_server() as server:
        monkeypatch.setattr(answers.os, "pwrite", pwrite)
        with pytest.raises(MachineError, match="the disk is full"):
            ask(config, server)
        monkeypatch.undo()
        assert Path(config.out).read_bytes().endswith(b"\n")
        assert 0 < len(lines(config)) < 20
        ask(config, server)
    assert Path(config.out).read_bytes() == expected
