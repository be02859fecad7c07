"""Trackers are told what metrics.jsonl has, each number once, however often a run was stopped."""

import importlib.util
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common import storage
from common.config import knobs
from common.errors import EyasError
from common.stopping import Stop
from tests.train import small_run, small_store
from tests.train.test_resume import stopped_at
from train import logs
from train.config import TrainConfig
from train.logs import TRACKERS, Logs, numbers_of, require
from train.run import run

HERE = [name for name in TRACKERS if (found := importlib.util.find_spec(name)) and found.origin]
SECRET = "8f3c61d04aSECRETe5b27f9a18cc07d2b6e4a9f1"


class Memory:
    """A tracker in memory; `told` outlives it as a service does."""

    told: list  # of (step, numbers)
    fails = False

    def __init__(self, out, name, identity, config):
        self.told.append((name, identity))

    def log(self, step, numbers):
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.told.append((step, numbers))

    def close(self, done):
        print("Run finished.")
        self.told.append(done)


@pytest.fixture
def memory(monkeypatch):
    kind = type("Kind", (Memory,), {"told": []})
    monkeypatch.setitem(TRACKERS, "wandb", kind)
    return kind


def until(found):
    """Trackers are told by threads of their own."""
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


def train(step):
    return {"step": step, "loss": 1.5, "loss_k": [1.0, 0.5]}


def test_a_killed_run_tells_no_step_twice_and_goes_on_under_its_id(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_SECONDS", 0.0)
    first = Logs(("wandb",), str(tmp_path / "run"), {})
    for line in (train(2), train(4), {"step": 4, "evaluation": {"step": 4, "acc": [0.25]}}, train(6)):
        first.add(line)
    until(lambda: len(memory.told) == 5)
    # It is killed, and goes on from the state of step 3: steps 4 and 6 are computed once more.
    second = Logs(("wandb",), str(tmp_path / "run"), {})
    for line in (train(4), {"step": 4, "evaluation": {"step": 4, "acc": [0.25]}}, train(6), train(8)):
        second.add(line)
    second.close(True)
    numbers = {"train/loss": 1.5, "train/loss_k/0": 1.0, "train/loss_k/1": 0.5}
    opened, *told, again, last, done = memory.told
    assert (opened, done) == (again, True)
    assert told == [(2, numbers), (4, numbers), (4, {"eval/acc/0": 0.25}), (6, numbers)]
    assert last == (8, numbers)


def test_a_service_that_fails_ends_the_telling_and_not_the_run(memory, tmp_path, capsys):
    memory.fails = True
    told = Logs(("wandb",), str(tmp_path), {})
    for step in range(3):
        told.add(train(step + 1))
    told.close(False)
    said = capsys.readouterr().err
    assert said.count("wandb fails, and is told no more of this run: no route to host; metrics.jsonl") == 1


def test_a_service_that_does_not_answer_holds_up_nothing(memory, tmp_path, monkeypatch, capsys):
    """Nor is it waited for at the end of every head of a sweep. What it was not told is told next time."""
    monkeypatch.setattr(logs, "_SECONDS", 0.0)
    monkeypatch.setattr(logs, "_STOPPED", 0.3)
    monkeypatch.setattr(logs, "_silent", set())
    answer = threading.Event()
    monkeypatch.setattr(memory, "log", lambda self, step, numbers: answer.wait(60))
    start, lines = time.monotonic(), [train(step) for step in range(1, 6)]
    heads = [Logs(("wandb",), str(tmp_path / name), {}) for name in "abcdefgh"]
    for head in heads:
        head.add(lines[0])
    until(lambda: all(head._told["wandb"]["train"] == 1 for head in heads))
    for head in heads:
        for line in lines[1:]:
            head.add(line)
        head.close(False)
    assert time.monotonic() - start < 10
    assert capsys.readouterr().err.count("wandb does not answer, and is told no more of this run; met") == 8
    answer.set()
    monkeypatch.setattr(logs, "_silent", set())
    heard = []
    monkeypatch.setattr(memory, "log", lambda self, step, numbers: heard.append(step))
    Logs(("wandb",), str(tmp_path / "a"), {}, lines).close(True)
    assert heard == [2, 3, 4, 5]


def test_a_signal_ends_the_waiting_for_a_service(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "_STOPPED", 0.3)
    monkeypatch.setattr(logs, "_silent", set())
    answer = threading.Event()
    monkeypatch.setattr(memory, "close", lambda self, done: answer.wait(60))
    told = Logs(("wandb",), str(tmp_path), {})
    start = time.monotonic()
    with Stop(everywhere=True):
        os.kill(os.getpid(), signal.SIGTERM)
        told.close(True)
    assert time.monotonic() - start < 10
    answer.set()


@pytest.mark.slow
def test_stdout_has_the_runs_result_alone_though_a_tracker_prints(memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "require", lambda *_: None)  # the package may be missing here
    store = small_store.write_store(str(tmp_path / "store"), test=False)
    run(small_run.short_run(store, str(tmp_path / "out"), steps=1, log_to=["wandb"]))
    assert memory.told[-1] is True
    found = capsys.readouterr()
    assert (found.out, "Run finished." in found.err) == ("", True)


def test_a_missing_package_is_refused_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # where wandb keeps what it could not send
    config = TrainConfig(str(tmp_path / "none"), str(tmp_path / "out"), log_to=["wandb"])
    if "wandb" not in HERE:
        with pytest.raises(EyasError, match=r"pip install -e '\.\[wandb\]'"):
            run(config)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EyasError, match=r"trackio needs a package that is not here: .venv/bin/pip install -e '\.\[trackio"
    ):
        require(("trackio",), "out")


def test_a_package_that_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("from numpy import of_another_version")
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    config = TrainConfig(str(tmp_path / "none"), str(tmp_path / "out"), log_to=["mlflow"])
    with pytest.raises(EyasError, match=r"mlflow: its package here cannot be used \(cannot import name"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_a_damaged_note_is_one_line(tmp_path):
    (tmp_path / logs.FILE).write_text('{"wandb": {"id": 5}}')
    with pytest.raises(EyasError, match=r"trackers.json: wandb.id is 5, but .*; delete it"):
        Logs(("wandb",), str(tmp_path), {})


def told_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder / "out" / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    events = [(event, tag) for tag in found.Tags()["tensors"] for event in found.Tensors(tag)]
    return [(event.step, tag, float(make_ndarray(event.tensor_proto))) for event, tag in events]


def told_mlflow(folder):
    import mlflow

    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'eyas'")
    (one,) = client.search_runs([experiment.experiment_id])
    assert (one.info.status, one.data.params["learning_rate"]) == ("FINISHED", "0.03")
    return [
        (m.step, name, m.value)
        for name in one.data.metrics
        for m in client.get_metric_history(one.info.run_id, name)
    ]


def told_trackio(folder):
    (place,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(place) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    return [(step, name, x) for _, step, text in rows for name, x in json.loads(text).items()]


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, record = 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # too little of a block for another one
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def told_wandb(folder):
    from wandb.proto import wandb_internal_pb2

    found, names = [], set()
    for place in sorted((folder / "out" / "wandb").glob("offline-run-*/*.wandb")):
        names.add(place.name)
        for data in wandb_records(place.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = items.get("_step", record.history.step.num)
            found += [(step, name, x) for name, x in items.items() if not name.startswith("_")]
    assert len(names) == 1, "one run"
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run that was stopped twice and tells every tracker that is installed here."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        store = small_store.write_store(str(folder / "store"))
        config = small_run.short_run(store, str(folder / "out"), log_to=HERE)
        for step in (2, 5):
            stopped_at(step, config, patch)
        run(config)
        run(config)  # is done: nobody is told of it
        yield folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_what_metrics_has_each_number_once(request, name):
    if name not in HERE:
        pytest.skip(f"{name} is not installed")
    folder = request.getfixturevalue("told")
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    expected = sorted((line["step"], n, x) for line in lines for n, x in numbers_of(line).items())
    found = sorted(globals()[f"told_{name}"](folder))
    assert [x[:2] for x in found] == [x[:2] for x in expected]
    assert [x[2] for x in found] == pytest.approx([x[2] for x in expected], rel=1e-6)
    for place in (Path(where, file) for where, _, files in os.walk(folder) for file in files):
        if place.is_file():  # and no link to a place of its library's own
            assert SECRET.encode() not in place.read_bytes(), f"{place} has a secret"
    assert storage.read_json(str(folder / "out" / logs.FILE))[name]["train"] == 7


def test_every_tracker_can_be_chosen():
    (choices,) = (knob.setting.choices for knob in knobs(TrainConfig) if knob.name == "log_to")
    assert set(choices) == TRACKERS.keys()


def test_it_is_not_part_of_what_the_run_is(tmp_path):
    """Other trackers continue a run."""
    config = TrainConfig("store", "out", log_to=["wandb", "mlflow"])
    assert config.log_to == ("wandb", "mlflow")
    with pytest.raises(ValueError, match=r"log_to=\('neptune',\) is unknown; use one of wandb, tensor"):
        replace(config, log_to=("neptune",))


def test_what_a_killed_run_had_not_told_is_told_when_it_goes_on(memory, tmp_path):
    """Lines wait some seconds before they are told; a tracker that is added later is told all."""
    lines = [train(2), {"step": 2, "evaluation": {"step": 2, "acc": [0.25]}}, train(4)]
    first = Logs(("wandb",), str(tmp_path / "run"), {})
    for line in lines:
        first.add(line)
    until(lambda: len(memory.told) == 1)  # it is killed before the lines are told
    second = Logs(("wandb",), str(tmp_path / "run"), {}, lines)
    second.add(train(6))
    second.close(True)
    assert [step for step, _ in memory.told[2:-1]] == [2, 2, 4, 6]
    for _ in range(2):
        assert len(memory.told) == 7
        Logs(("wandb",), str(tmp_path / "run"), {}, [*lines, train(6)], done=True).close(True)


def test_a_run_that_is_done_tells_what_it_was_killed_before_telling(memory, tmp_path):
    Logs(("wandb",), str(tmp_path / "run"), {})
    Logs(("wandb",), str(tmp_path / "run"), {}, [train(2)], done=True).close(True)
    assert [x for x in memory.told if x is True or x[0] == 2][-1] is True
    assert 2 in [x[0] for x in memory.told if x is not True]
