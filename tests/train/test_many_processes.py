"""Training on several processes gives the losses of one, and ends on all of them alike."""

import os
import signal
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from common import storage
from pipelines.bench import bucket
from tests import pod as miniature
from tests.train import small_run, small_store
from tests.train.small_run import lines_of, weights_of
from train.run import run

TRAIN = """
from train.run import TrainConfig, run
found = run(TrainConfig(**{config}))
print(found["steps_before"], found["steps"])
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("pod")
    store = small_store.write_store(str(place / "store"), precision="int8")
    once = {"steps": 2, "log_every": 1, "eval_every": None, "save_every": None}
    return small_run.short_run(store, str(place / "alone"), learning_rate=1e-2, init="target", **once)


@pytest.fixture(scope="module")
def alone(config):
    run(config)
    return config.out


def train(config, processes, devices, prelude=""):
    text = prelude + TRAIN.format(config=asdict(config))
    return miniature.wait(miniature.start(text, processes, devices), seconds=300)


def training(config, processes, devices):
    """The processes, of which the first has told of a step."""
    started = miniature.start(TRAIN.format(config=asdict(config)), processes, devices)
    moment = time.monotonic() + 200
    while not os.path.exists(f"{config.out}/metrics.jsonl") or not lines_of(config.out):
        assert time.monotonic() < moment
        time.sleep(0.1)
    return started


def require_same(out, alone):
    """The same losses and weights, but for rounding."""
    for line, wanted in zip(lines_of(out), lines_of(alone), strict=True):
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(line.get(name, 0), wanted.get(name, 0), rtol=2e-3)
        if "evaluation" in line:
            np.testing.assert_allclose(line["evaluation"]["loss"], wanted["evaluation"]["loss"], rtol=2e-3)
    found = weights_of(out)
    for name, weight in weights_of(alone).items():
        apart = np.abs(found[name].astype(np.float32) - weight.astype(np.float32))
        # Adam steps as far by a gradient that is nothing but rounding as by any other
        assert (apart > 0.02 * np.abs(weight.astype(np.float32)).max()).mean() < 0.01, name


def last_lines(found):
    return [(p.code, p.out.strip().splitlines()[-1]) for p in found]


@pytest.mark.parametrize(
    ("dp", "sp"), [(4, 1), *(pytest.param(dp, 4 // dp, marks=pytest.mark.slow) for dp in (1, 2))]
)
def test_two_processes_train_the_head_of_one(config, alone, tmp_path, dp, sp):
    """Also where each has a piece of every row."""
    here = replace(config, out=f"{tmp_path}/out", dp=dp, sp=sp)
    found = train(here, 2, 2)
    assert last_lines(found) == [(0, "0 2")] * 2, found
    assert not found[1].err.strip(), "one process tells what happens, the others are silent"
    require_same(here.out, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "devices"), [(4, 4), (1, 16)])
def test_sixteen_chips_train_the_head_of_one(config, tmp_path, processes, devices):
    """The fitted start too, which every process computes from its own rows."""
    config = replace(config, batch_rows=16, steps=4, eval_every=2, init="fitted")
    run(replace(config, out=f"{tmp_path}/alone"))
    here = replace(config, out=f"{tmp_path}/out", dp=16)
    assert last_lines(train(here, processes, devices)) == [(0, "0 4")] * processes
    require_same(here.out, f"{tmp_path}/alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_error_of_one_process_ends_both_and_other_processes_go_on(config, tmp_path):
    """A row that one of them cannot read; what is saved stays, and one process ends the run."""
    broken = """
from common import store
if me == 1:
    read, count = store.Store.read, []
    def fail(self, names, rows):
        count.extend(name for name in names if name == "aux_hidden")
        if len(count) > 8:
            raise store.EyasError(f"row {rows[0]} is damaged; prepare it anew")
        return read(self, names, rows)
    store.Store.read = fail
"""
    config = replace(config, steps=20, save_every=1, eval_every=20)
    run(replace(config, out=f"{tmp_path}/alone"))
    here = replace(config, out=f"{tmp_path}/out", dp=4)
    found = train(here, 2, 2, broken)
    assert [p.code for p in found] == [2, 2], found
    assert "Error: process 1: row" in found[0].err
    assert not any("Traceback" in p.err for p in found)
    assert 0 < run(replace(here, dp=1))["steps_before"] < 20
    require_same(here.out, f"{tmp_path}/alone")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_to_one_process_saves_the_state_of_all(config, tmp_path):
    config = replace(config, steps=4000, save_every=4000, eval_every=4000)
    here = replace(config, out=f"{tmp_path}/out", dp=4)
    started = training(here, 2, 2)
    asked = time.monotonic()
    started[1].send_signal(signal.SIGTERM)
    found = miniature.wait(started)
    assert time.monotonic() - asked < 10
    assert all("train stopped; step" in p.err for p in found), found
    step = found[0].err.split("train stopped; step ")[1].split()[0]
    assert int(step) > 0
    assert step in storage.list_names(f"{here.out}/state")


SWEEP = """
from train import sweep
from train.config import TrainConfig
from train.trainer import Trainer
take = Trainer.take
def fails(self, batch):
    take(self, batch)
    if self.name == "bad":
        raise EyasError("it comes to nothing")
Trainer.take = fails
found = sweep.run({{name: TrainConfig(**c) for name, c in {configs}.items()}}, {out!r})
print(found["done"], found["failed"])
"""


@pytest.mark.slow
def test_a_sweep_on_two_processes_gives_the_heads_of_one(config, alone, tmp_path):
    """Rows of half the data cross from one process to the other; a head that fails does so on both."""
    out = f"{tmp_path}/out"
    half = replace(config, share=0.5, seed=3)
    run(replace(half, out=f"{tmp_path}/half"))
    heads = {"one": config, "half": half, "bad": replace(config, seed=1)}
    configs = {name: asdict(replace(c, out=f"{out}/{name}", dp=4)) for name, c in heads.items()}
    text = SWEEP.format(configs=configs, out=out)
    found = miniature.wait(miniature.start(text, 2, 2), seconds=300)
    said = "['one', 'half'] {'bad': 'it comes to nothing'}"
    assert last_lines(found) == [(0, said)] * 2, found
    assert not found[1].err.strip()
    require_same(f"{out}/one", alone)
    require_same(f"{out}/half", f"{tmp_path}/half")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_keep_a_run_in_a_bucket_and_one_goes_on(config, alone):
    out = "gs://bucket/runs/one"
    here = replace(config, out=out, dp=4, save_every=1)
    with bucket.served("bucket") as url:
        for processes, wanted in ((2, "0 2"), (1, "2 2")):
            text = TRAIN.format(config=asdict(here))
            started = miniature.start(text, processes, 4 // processes, **bucket.environment(url))
            found = miniature.wait(started, seconds=300)
            assert last_lines(found) == [(0, wanted)] * processes, found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_who_loses_another_process_says_so_and_is_started_again(config, tmp_path):
    here = replace(config, out=f"{tmp_path}/out", dp=4, steps=4000, save_every=4000, eval_every=4000)
    started = training(here, 2, 2)
    started[1].kill()
    found = miniature.wait(started)
    assert [p.code for p in found] == [42, -signal.SIGKILL], found
    assert "start the same command again" in found[0].err
    assert "Traceback" not in found[0].err
