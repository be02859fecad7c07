"""Conversations encoded by several processes: the same results in the same order; every end is one line."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.errors import EyasError, MachineError
from dump import prepare, workers
from dump.chat import Chat
from dump.clean import Conversation
from dump.encode import encode
from dump.prepare import PrepareConfig, run
from tests.dump.chats import CHATML, CHATS, write_model
from tests.dump.test_prepare import contents

T = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def several(monkeypatch):
    """Two worker processes from the first batch on."""
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(workers, "_ALONE", 0)
    monkeypatch.setattr(prepare, "_BATCH", 3)


def batches(count):
    rng = np.random.default_rng(0)
    for number in range(count):
        talks = [
            [{"role": "user", "content": f"{number}.{i}?"}, {"role": "assistant", "content": "a" * int(n)}]
            for i, n in enumerate(rng.integers(1, 90, 5))
        ]
        yield [Conversation(f"{number}.{i}", "", talk) for i, talk in enumerate(talks)]


@pytest.mark.parametrize("count", [0, 1, 11])
def test_results_come_in_order_from_processes_that_know_nothing_of_jax(model, several, count):
    chat = Chat.load(model)
    found = []
    with closing(workers.encode_all(chat, model, batches(count), T)) as encoded:
        for batch, made in encoded:
            found.append((batch, made))
            for child in multiprocessing.active_children():
                assert "jaxlib" not in Path(f"/proc/{child.pid}/maps").read_text()
    assert len(found) == count
    for (batch, made), wanted in zip(found, batches(count), strict=True):
        alone = encode(chat, wanted, T)
        assert batch == wanted
        assert (made.kept, made.counts) == (alone.kept, alone.counts)
        for name in ("tokens", "mask", "lengths", "counted", "read"):
            np.testing.assert_array_equal(getattr(made, name), getattr(alone, name))
    assert not multiprocessing.active_children()


def test_a_store_is_the_same_by_one_process_and_by_several(model, several, tmp_path, monkeypatch):
    config = PrepareConfig((str(CHATS),), model, str(tmp_path / "two"), length=256, holdout=0.2)
    run(config)
    monkeypatch.setattr(workers, "cores", lambda: 1)
    monkeypatch.setattr(prepare, "_BATCH", 7)
    run(PrepareConfig((str(CHATS),), model, str(tmp_path / "one"), length=256, holdout=0.2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_worker_that_dies_is_one_line(model, several):
    with closing(workers.encode_all(Chat.load(model), model, batches(30), T)) as encoded:
        next(encoded)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(MachineError, match=r"has died \(exit code -9\).*run the same command again"):
            list(encoded)
    assert not multiprocessing.active_children()


def test_what_a_worker_refuses_is_raised_here(model, several, tmp_path):
    with pytest.raises(EyasError, match="no tokenizer"):
        list(workers.encode_all(Chat.load(model), str(tmp_path), batches(3), T))


def test_a_template_is_bounded_in_workers_too(several, tmp_path):
    bomb = "{% if messages[0].content != 'Which colour?' %}{{ 'x' * 10**11 }}{% endif %}"
    runaway = str(write_model(tmp_path / "model", CHATML + bomb))
    with pytest.raises(EyasError, match=r"ran away in 3 conversations \(it needs too much memory\)"):
        run(PrepareConfig((str(CHATS),), runaway, str(tmp_path / "store"), length=256))
    assert not (tmp_path / "store").exists()


SCRIPT = """
from dump import workers
workers.cores, workers._ALONE = (lambda: 2), 1
from pipelines.__main__ import main
if __name__ == "__main__":
    main()
"""


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, True, 42),
        (signal.SIGTERM, False, 42),
        (signal.SIGKILL, False, -9),
    ],
)
def test_however_prepare_ends_its_workers_end_too(model, tmp_path, number, whole_group, code):
    talk = {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "yes " * 400}]}
    with open(tmp_path / "many.jsonl", "w") as file:
        for i in range(40_000):
            talk["conversations"][0]["value"] = f"{i}?"
            file.write(json.dumps(talk) + "\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), "prepare", "--model", model]
    command += ["--data", str(tmp_path / "many.jsonl"), "--store", str(tmp_path / "store")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    while len(children(process.pid)) < 3:  # two workers and multiprocessing's tracker
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(1)
    started = children(process.pid)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    if number != signal.SIGKILL:
        assert err.splitlines()[-1] == "Error: stopped; the same command goes on from what is kept"
    deadline = time.monotonic() + 20
    while not all(map(gone, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, started))
    assert not (tmp_path / "store").exists()
