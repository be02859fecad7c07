"""A run that is stopped or killed at any moment is continued to the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.run import run
from tests.pipelines.regenerate.asking import write_data
from tests.pipelines.regenerate.chat_server import chat_server

ROOT = Path(__file__).parents[3]
EYAS = [sys.executable, "-m", "pipelines"]


def command(folder, server):
    answers = str(folder / "answers.jsonl")
    asked = ["regenerate", "--data", str(folder / "chats.jsonl"), "--endpoint", server.url]
    return [*EYAS, *asked, "--served-model", "tiny", "--out", answers, "--concurrency", "8"]


def whole(folder, server):
    """The bytes of a run that nobody interrupts."""
    place = str(folder / "answers.jsonl")
    run(RegenerateConfig((str(folder / "chats.jsonl"),), place, (server.url,), "tiny", concurrency=8))
    found = (folder / "answers.jsonl").read_bytes()
    for name in ("answers.jsonl", "answers.settings.json"):
        os.unlink(folder / name)
    return found


def interrupted(folder, server, number, after):
    """Sends a signal when the server has been asked `after` times; (exit code, standard error)."""
    count = iter(range(after))
    server.choose = lambda request: process.send_signal(number) if next(count, None) is None else None
    process = subprocess.Popen(
        command(folder, server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    _, told = process.communicate(timeout=100)
    server.choose = lambda request: None
    return process.returncode, told


def whole_lines(folder):
    """The conversations that have a whole line; a line behind them may be torn."""
    path = folder / "answers.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["number"] for line in lines]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 42)])
def test_an_interrupted_run_is_continued(tmp_path, number, code):
    write_data(tmp_path / "chats.jsonl", 40)
    with chat_server() as server:
        expected = whole(tmp_path, server)
        server.delay = 0.01
        found, told = interrupted(tmp_path, server, number, after=40)
        assert found == code
        assert (
            number == signal.SIGKILL or "Error: stopped; the same command goes on from what is kept" in told
        )
        done = whole_lines(tmp_path)
        assert 0 < len(done) == len(set(done)) < 40
        server.requests.clear()
        assert whole(tmp_path, server) == expected
        assert len(server.requests) == sum(1 + n % 3 for n in set(range(40)) - set(done))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path):
    write_data(tmp_path / "chats.jsonl", 200)
    draw = random.Random(5)
    with chat_server() as server:
        expected = whole(tmp_path, server)
        server.delay = 0.003
        kills, before = 0, []
        while (code := interrupted(tmp_path, server, signal.SIGKILL, draw.randrange(1, 60))[0]) == -9:
            kills += 1
            done = whole_lines(tmp_path)
            assert done[: len(before)] == before, "what was recorded stays"
            assert len(done) == len(set(done))
            if kills % 3 == 0:  # as a machine does that loses its power
                with open(tmp_path / "answers.jsonl", "r+b") as file:
                    file.truncate(max(0, os.path.getsize(file.name) - draw.randrange(300)))
            before = whole_lines(tmp_path)
        assert code == 0
        assert kills > 10
    assert (tmp_path / "answers.jsonl").read_bytes() == expected
