"""No failure of a server loses an answer or doubles one, and one line says which failed for good."""

import email.utils
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EyasError, RestartError
from pipelines.regenerate import endpoint
from pipelines.regenerate.run import run
from tests.pipelines.regenerate.asking import SYSTEM, ask, lines, old, only_one, record, user
from tests.pipelines.regenerate.chat_server import RAW, RUBBISH, chat_server

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
    monkeypatch.setattr(endpoint, "LARGEST", 1 << 20)
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
    monkeypatch.setattr(endpoint, "LARGEST", 1 << 20)
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
        ("402", EyasError, "402: bad None; check the address"),
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


def test_no_server_at_all(config):
    with pytest.raises(RestartError, match=r"http://127\.0\.0\.1:1: nothing answered for .*Cannot connect"):
        run(replace(config, patience=0.2))


def test_an_address_that_is_none_is_a_mistake(config):
    """Whoever starts a command again on 42 would do so for ever."""
    with pytest.raises(EyasError, match=r"it is no address.; mend that") as error:
        run(replace(config, endpoint=("http://0/v1",)))
    assert error.value.exit_code == 2


def test_a_server_without_https(config):
    with chat_server() as server, pytest.raises(EyasError, match="it speaks no https"):
        run(replace(config, endpoint=(server.url.replace("http:", "https:"),)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_faults_of_many_servers_in_any_order(config, expected, monkeypatch, seed):
    monkeypatch.setattr(endpoint, "LARGEST", 1 << 20)
    faults = [fault for fault in FAULTS if fault != "hang"] * 2
    chosen = [now_and_then(faults, seed + n, share=0.5) for n in range(3)]
    with chat_server(chosen[0]) as one, chat_server(chosen[1]) as two, chat_server(chosen[2]) as three:
        concurrency = 1 + seed * seed
        for _ in range(5):  # of so many faults, some meet one conversation again and again
            with suppress(RestartError):
                found = ask(config, one, two, three, timeout=0.8, concurrency=concurrency, stream=seed > 3)
                break
    assert found["outcomes"] == {"answered": 20}
    if seed <= 3:
        assert Path(config.out).read_bytes() == expected
