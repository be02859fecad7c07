"""Thirty kills at random moments of a run and of a sweep: each head is that of one left alone, to the bit."""

import os
import random
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

from common import storage
from tests.train import small_store
from tests.train.small_run import assert_same_run
from train import sweep
from train.config import TrainConfig
from train.run import run

ROOT = Path(__file__).parents[2]
KILLS = 30
SWEEP = """
[[experiments]]
name = "one"
[[experiments]]
name = "half"
share = 0.5
steps = 250
seed = 3
[[experiments]]
name = "long"
ttt_steps = 3
learning_rate = 1e-2
"""
DIFFERENT = {
    "one": {},
    "half": {"share": 0.5, "steps": 250, "seed": 3},
    "long": {"ttt_steps": 3, "learning_rate": 1e-2},
}
SETTINGS = {
    "steps": 600,  # so many that no life is long enough for them
    "batch_rows": 2,
    "ttt_steps": 2,
    "draft_vocab": 32,
    "optimizer": "adamw",
    "learning_rate": 3e-2,
    "log_every": 7,
    "eval_every": 60,
    "save_every": 9,
    "init": "normal",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("kills")
    return TrainConfig(small_store.write_store(str(place / "store")), str(place / "whole"), **SETTINGS)


def saved_step(out: Path) -> int:
    """The newest state of the runs in `out`."""
    found = 0
    for folder in (out / "state", *out.glob("*/state")):
        names = storage.list_names(str(folder))
        found = max([found, *(int(name) for name in names if name.isdigit())])
    return found


def killed_again_and_again(command: list[str], out: Path, seed: int) -> None:
    """Starts the command until it was killed 30 times, and once more.

    A third of the kills come at any time since the start, the others some steps after it went on.
    """
    chance, begins = random.Random(seed), 0.0
    for number in range(KILLS):
        log = out.parent / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        start, before = time.monotonic(), saved_step(out)
        try:
            if number % 3 == 2:
                time.sleep(chance.uniform(0, begins))
            else:
                while saved_step(out) <= before and time.monotonic() - start < 200 and process.poll() is None:
                    time.sleep(0.002)
                begins = time.monotonic() - start
                time.sleep(chance.uniform(0, 0.05))
            assert process.poll() is None, f"it ended before kill {number}: {log.read_text()[-3000:]}"
        finally:
            process.kill()
            process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def options_of(config: TrainConfig, out: Path) -> list[str]:
    names = {field.name for field in fields(config)} & SETTINGS.keys()
    given = [text for name in names for text in ("--" + name.replace("_", "-"), str(getattr(config, name)))]
    return ["--store", config.store, "--model", f"{config.store}/target", "--out", str(out), *given]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run(config, tmp_path):
    run(config)
    out = tmp_path / "out"
    killed_again_and_again([sys.executable, "-m", "pipelines", "train", *options_of(config, out)], out, 1)
    assert_same_run(out, config.out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(config.out)), "nothing is left behind"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sweep(config, tmp_path):
    whole, out, file = tmp_path / "whole", tmp_path / "out", tmp_path / "sweep.toml"
    sweep.run({n: replace(config, out=f"{whole}/{n}", **own) for n, own in DIFFERENT.items()}, str(whole))
    settings = "\n".join(f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in SETTINGS.items())
    file.write_text(f"[settings]\n{settings}\n{SWEEP}")
    place = ["--store", config.store, "--model", f"{config.store}/target", "--out", str(out), "--no-plots"]
    killed_again_and_again([sys.executable, "-m", "pipelines", "sweep", str(file), *place], out, 2)
    for name in DIFFERENT:
        assert_same_run(out / name, whole / name)
        assert storage.list_names(str(out / name)) == storage.list_names(str(whole / name))
