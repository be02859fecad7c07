"""The file of answers: continued, refused, never half written."""

import errno
import json
import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import EyasError, MachineError
from common.lock import locked_file
from pipelines.regenerate import answers, questions
from pipelines.regenerate import run as module
from pipelines.regenerate.run import run
from tests.pipelines.regenerate.asking import ask, lines, record, write_data
from tests.pipelines.regenerate.chat_server import chat_server


@pytest.mark.parametrize("name", ["answers.jsonl", "chats.jsonl", "inner/answers.ndjson"])
def test_answers_among_their_own_questions_are_refused(config, tmp_path, name):
    out = tmp_path / "data" / name
    out.parent.mkdir(parents=True)
    Path(config.data[0]).rename(tmp_path / "data" / "chats.jsonl")
    with pytest.raises(EyasError, match=r"would be data of .*; name another place"):
        run(replace(config, data=(f"{tmp_path}/data",), out=str(out)))
    assert [path.name for path in tmp_path.rglob("*.*")] == ["chats.jsonl"]


def test_each_file_of_answers_has_a_record_of_its_own(config):
    with chat_server() as server:
        for seed, name in enumerate(("answers.jsonl", "answers.ndjson") * 2):
            ask(config, server, out=str(Path(config.out).parent / name), seed=seed % 2)


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


def test_a_line_that_is_taken_out_is_asked_again(config, expected):
    with chat_server() as server:
        ask(config, server)
        kept = expected.splitlines(keepends=True)
        Path(config.out).write_bytes(b"".join(kept[:3] + kept[4:]))
        server.requests.clear()
        ask(config, server)
        assert [r["messages"][-1]["content"] for r in server.requests] == ["question 3.0?"]
    assert Path(config.out).read_bytes() == expected


def test_one_that_ends_while_its_lines_are_put_in_order_is_continued(config, expected, monkeypatch):
    with chat_server(delay=0.01) as server:
        monkeypatch.setattr(
            "os.replace", lambda old, new: raise_full() if new == config.out else rename(old, new)
        )
        with pytest.raises(MachineError, match="the disk is full"):
            ask(config, server)
        assert len(lines(config)) == 20
        assert sorted(Path(config.out).read_bytes().splitlines()) == sorted(expected.splitlines())
        monkeypatch.undo()
        server.requests.clear()
        ask(config, server)
        assert not server.requests
    assert Path(config.out).read_bytes() == expected
    assert not list(Path(config.out).parent.glob(".*.partial"))


rename = os.replace


def raise_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_without_room_for_the_questions_is_one_line(config, monkeypatch):
    def full(dir, buffering):
        return open("/dev/full", "wb", buffering)

    monkeypatch.setattr(questions.tempfile, "TemporaryFile", full)
    with pytest.raises(MachineError, match="the disk is full"):
        run(config)


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


def test_a_file_that_is_not_of_a_run_is_left_alone(config):
    Path(config.out).write_text("years of work\n")
    with pytest.raises(EyasError, match=r"answers\.jsonl is there, without answers\.settings\.json"):
        run(config)
    assert Path(config.out).read_text() == "years of work\n"


def line_of(name, *said):
    """That of conversation 1, which has a system turn and two questions."""
    roles = ("system", "user", "user") if said[0] == "Be brief." else ("user", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    about = {"id": name, "number": 1, "outcome": "empty", "tokens": 0}
    return json.dumps(about | {"messages": turns})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("years of work", "line 2 is not JSON"),
        ("{}", "line 2 has no number"),
        ('{"number": "0", "outcome": "answered", "tokens": 0}', 'line 2: number is "0"'),
        ('{"number": 1, "outcome": "answered", "tokens": 0}', "line 2 has no id"),
        (
            '{"number": 1, "outcome": "answered", "tokens": 0, "id": "a", "messages": []}',
            "line 2: messages is",
        ),
        (
            '{"number": 99, "outcome": "answered", "tokens": 0, "id": "a", "messages": [{}]}',
            "no conversation 99",
        ),
        (
            '{"number": 0, "outcome": "answered", "tokens": 0, "id": "a", "messages": [{}]}',
            "is there already",
        ),
        ('{"number": 1, "outcome": "SECRET text", "tokens": 0}', "line 2: outcome is"),
        (line_of("chat2", "Be brief.", "question 1.0?"), "line 2 is not of conversation 1 of the data"),
        (line_of("chat1", "question 1.0?"), "line 2 is not of conversation 1 of the data"),
        (line_of("chat1", "Be brief.", "question 1.0?", "1?"), "line 2 is not of conversation 1 of the data"),
        ("\ufeff" + line_of("chat1", "Be brief.", "question 1.0?"), "line 2 is not JSON"),
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


def test_two_at_once_are_refused_by_whatever_name(config, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(config.out)
    with locked_file(config.out):
        for out in (config.out, str(tmp_path / "link.jsonl")):
            with pytest.raises(EyasError, match=r"answers\.jsonl is in use by process"):
                run(replace(config, out=out))


def test_a_link_stays_and_its_file_grows(config, expected, tmp_path):
    (tmp_path / "inner").mkdir()
    link = tmp_path / "inner" / "link.jsonl"
    link.symlink_to(tmp_path / "file.jsonl")
    with chat_server(delay=0.01) as server:
        ask(config, server, out=str(link))
    assert link.is_symlink()
    assert (tmp_path / "file.jsonl").read_bytes() == expected
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["link.jsonl"]


@pytest.mark.parametrize("what", ["answers.jsonl", "."])
def test_answers_that_are_removed_while_they_come_are_no_success(config, monkeypatch, tmp_path, what):
    """Nor is somebody who has begun anew there disturbed."""
    monkeypatch.setattr(module, "_SYNC", 0.05)
    out = tmp_path / "new" / "answers.jsonl"

    def choose(request):
        if len(server.requests) == 20:
            path = out.parent / what
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            out.parent.mkdir(exist_ok=True)
            out.write_text("another run's\n")

    with chat_server(choose, delay=0.02) as server, pytest.raises(EyasError, match="removed"):
        ask(config, server, out=str(out))
    assert out.read_text() == "another run's\n"


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


LINES = (
    '{"id": "a", "number": 0, "outcome": "answered", "tokens": 5, "messages": [{}]}\n',
    *("{}\n", "\n", "7"),
)
DAMAGED = st.lists(st.sampled_from(LINES).map(str.encode) | st.binary(max_size=9), max_size=4).map(b"".join)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(DAMAGED)
def test_whatever_a_file_holds_whole_lines_are_read_or_it_is_refused(data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        try:
            with answers.Answers(str(path), 3, lambda *_: True, lambda: None) as found:
                assert len(found) == data.count(LINES[0].encode()) <= 1
        except EyasError:
            assert path.read_bytes() == data, "what is refused stays as it is"
        else:
            assert path.read_bytes() == LINES[0].encode() * len(found)
