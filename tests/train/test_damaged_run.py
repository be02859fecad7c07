"""A run whose folder is damaged: one line that names the place, or nothing that matters."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EyasError, MachineError
from tests.train.small_run import assert_same_head
from train.experiment import claimed
from train.planning import make_plan
from train.state import Saved
from train.trainer import Trainer, is_done

pytestmark = pytest.mark.usefixtures("told_once")


@functools.cache
def plan_of(config):
    return make_plan(config)


def continued(config, out, identity=None):
    """The step at which a run with this folder goes on."""
    plan = plan_of(config)
    plan = replace(plan, config=replace(config, out=str(out)), identity=identity or plan.identity)
    with claimed(plan), Trainer(plan) as found:
        return found.step


JSON = (
    "[]",
    "5",
    "null",
    "{}",
    '{"identity":5}',
    '{"step":"1"}',
    "[" * 100_000,
    "\x00",
    '{"best":5,"last":{}}',
)

CHECKPOINT = "_CHECKPOINT_METADATA"


def damages(path):
    """Ways to damage a file, by name."""
    data = path.read_bytes()
    yield "empty", lambda: path.write_bytes(b"")
    yield "cut", lambda: path.write_bytes(data[: len(data) // 2])
    yield "other bytes", lambda: path.write_bytes(bytes(255 - byte for byte in data))
    yield "gone", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())
    yield "a pipe", lambda: (path.unlink(), os.mkfifo(path))
    for text in JSON if path.suffix in (".json", ".jsonl") or path.name in ("metadata", CHECKPOINT) else ():
        yield text[:20], lambda text=text: path.write_text(text + "\n")


def said(config, out):
    """What is said of the folder, "" if a run goes on from its last state."""
    try:
        step = continued(config, out)
    except MachineError as error:
        return f"{error}: damage is nothing that the machine did\n"
    except EyasError as error:
        return str(error)
    assert step == 7
    return ""


def check_damaged(config, whole, out, names):
    """Every damage of the files `names` is one line that names the place, or does not matter.

    The number of those that are told is returned.
    """
    told = 0
    for name in names:
        for how, _ in damages(Path(whole) / name):
            shutil.copytree(whole, out, symlinks=True, ignore=shutil.ignore_patterns("best", "last"))
            dict(damages(out / name))[how]()
            text = said(config, out)
            assert "\n" not in text, (name, how)
            assert not text or str(out) in text, (name, how, text)
            told += bool(text)
            shutil.rmtree(out)
    return told


@pytest.mark.parametrize("name", ["experiment.json", "metrics.jsonl", "state/7/noted/metadata"])
def test_a_damaged_json_file_of_a_run_is_one_line(config, whole, tmp_path, name):
    assert check_damaged(config, whole, tmp_path / "out", [name]) >= 9


def test_lost_lines_of_metrics_are_told_of(config, whole, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "metrics.jsonl").unlink()
    assert continued(config, out) == 7
    assert f"{out}/metrics.jsonl has lost its lines up to step 7; the weights" in capfd.readouterr().err


def test_a_damaged_description_of_a_state_is_one_line_or_does_not_matter(config, whole, tmp_path):
    assert check_damaged(config, whole, tmp_path / "out", [f"state/7/{CHECKPOINT}"])


@pytest.mark.slow
def test_whatever_is_damaged_of_a_state_is_one_line_or_does_not_matter(config, whole, tmp_path):
    """A run goes on only from a state whose every bit is as it was."""
    states = os.walk(f"{whole}/state/7/state")
    names = [
        os.path.relpath(os.path.join(folder, file), whole) for folder, _, files in states for file in files
    ]
    assert check_damaged(config, whole, tmp_path / "out", names) > 20


def test_a_changed_bit_of_a_saved_weight_is_found(config, whole, tmp_path, monkeypatch):
    restore = Saved._read

    def flipped(self, step, **wanted):
        found = restore(self, step, **wanted)
        weight = found["state"].params["fc.weight"]
        params = found["state"].params | {"fc.weight": weight.at[0, 0].multiply(1 + 1e-6)}
        return found | {"state": found["state"]._replace(params=params)}

    monkeypatch.setattr(Saved, "_read", flipped)
    with pytest.raises(EyasError, match=r"state/7 is damaged: .*fc.weight.* is not what was saved; delete"):
        continued(config, whole)


def test_a_changed_number_beside_a_state_is_found(config, whole, tmp_path):
    """By the acceptance length of best/ it is told whether a head is better."""
    out, number = tmp_path / "out", json.dumps(Saved(whole).noted()[1]["length_greedy"])
    shutil.copytree(whole, out)
    noted = out / "state/7/noted/metadata"
    assert number in noted.read_text()
    noted.write_text(noted.read_text().replace(number, str(float(number) + 0.25)))
    with pytest.raises(EyasError, match=r"state/7/noted is not what was saved at step 7; delete"):
        continued(config, out)
    with pytest.raises(EyasError, match="is not what was saved"):
        Saved(str(out)).noted()


def test_a_state_of_other_shapes_or_of_another_step_is_refused(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    wider = replace(config, ffn=48)
    with pytest.raises(EyasError, match=r"state/7 cannot be read \(Requested shape.*delete that step"):
        continued(wider, out, plan_of(config).identity)
    shutil.copytree(out / "state/7", out / "state/9")
    with pytest.raises(EyasError, match=r"state/9/noted is not what was saved at step 9; delete"):
        continued(config, out)


def test_names_of_no_step_beside_the_states_are_left_alone(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "state/notes").write_text("mine")
    (out / "state/.cache").mkdir()
    assert continued(config, out) == 7
    assert (out / "state/notes").exists()


@pytest.mark.parametrize("what", ["*", "model.safetensors"])
@pytest.mark.parametrize("name", ["last", "best"])
def test_a_head_that_was_taken_away_is_exported_again_or_told_of(config, whole, tmp_path, capfd, name, what):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for file in (out / name).glob(what):
        file.unlink()
    plan = replace(plan_of(config), config=replace(config, out=str(out)))
    assert not is_done(plan)
    with Trainer(plan) as trainer:
        step, newest = (getattr(trainer.exported, name)["step"], trainer.step)
        trainer.finish()
    if step == newest:
        assert_same_head(out, whole, name)
        assert is_done(plan)
    else:
        told = f"{out}/{name} is lost, the head of step {step}; to have it made again, delete the steps from"
        assert told in capfd.readouterr().err
