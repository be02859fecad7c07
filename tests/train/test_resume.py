"""What a run leaves on disk: continued, it is an uninterrupted run's."""

import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from common import pod, stopping
from common.errors import EyasError, MachineError
from common.lock import locked
from tests.train.small_run import ask_to_stop, assert_same_run, lines_of
from train import evaluate, together
from train.experiment import claimed
from train.exported import Exported
from train.planning import make_plan
from train.run import run
from train.state import Saved
from train.step import State
from train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("told_once")


def stopped_at(step, config, monkeypatch):
    """Runs until SIGTERM comes while step `step` is computed."""
    with monkeypatch.context() as patch:
        ask_to_stop(patch, Trainer, "take", lambda trainer, _: trainer.step + 1 == step)
        with pytest.raises(EyasError, match=rf"train stopped; step {step} of {config.steps} is saved"):
            run(config)


@pytest.mark.parametrize("step", [2, 6, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3))])
def test_a_run_stopped_after_any_step_loses_no_line(config, whole, tmp_path, monkeypatch, step):
    """Steps 2 and 6 are logged, 3 and 6 evaluated."""
    here = replace(config, out=str(tmp_path / "out"))
    stopped_at(step, here, monkeypatch)
    run(here)
    assert_same_run(here.out, whole)


def test_a_run_that_is_stopped_while_its_evaluation_compiles_has_all_of_its_steps(
    config, tmp_path, monkeypatch
):
    """On an accelerator that takes minutes."""
    here = replace(config, out=str(tmp_path / "out"))

    def asked(work, check):
        os.kill(os.getpid(), signal.SIGTERM)
        return stopping.interruptible(threading.Event().wait, check)

    monkeypatch.setattr(evaluate, "interruptible", asked)
    with pytest.raises(EyasError, match="step 3 of 7 is saved"):
        run(here)


def test_an_evaluation_that_is_done_again_has_one_line(config, whole, tmp_path, monkeypatch):
    """The run is stopped while it evaluates step 3, and then killed behind that evaluation's line."""
    here = replace(config, out=str(tmp_path / "out"))

    def killed(self):
        raise MachineError("killed")

    with monkeypatch.context() as patch:
        ask_to_stop(patch, together, "score_all")
        with pytest.raises(EyasError, match="step 3 of 7 is saved"):
            run(here)
    with monkeypatch.context() as patch:
        patch.setattr(Exported, "wait", killed)
        with pytest.raises(MachineError, match="killed"):
            run(here)
    run(here)
    assert_same_run(here.out, whole)


def test_the_best_head_is_the_one_that_the_metrics_name_after_a_kill_and_with_other_evaluations(
    config, tmp_path, monkeypatch
):
    """The run is killed when the head of step 3 is exported and no later state is saved."""
    here = replace(config, out=str(tmp_path / "out"))
    stopped_at(2, here, monkeypatch)

    def killed(self):
        self.exported.wait()
        raise MachineError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(MachineError, match="killed"):
            run(here)
    assert "training step | 3 of 7" in Path(here.out, "best/README.md").read_text()
    found = run(replace(here, eval_every=5))
    measured = [line["step"] for line in lines_of(here.out) if "evaluation" in line]
    assert measured == [3, 5, 7]
    for name in ("best", "last"):
        assert f"training step | {found[name]['step']} of 7" in Path(here.out, name, "README.md").read_text()


@pytest.mark.parametrize("taken", [False, True])
def test_of_a_run_whose_folder_is_removed_nothing_is_left(config, tmp_path, monkeypatch, taken):
    """What the background writes meanwhile goes as well; what somebody else has put there stays."""
    out = tmp_path / "out"

    def removed():
        shutil.rmtree(out)
        (out / "state").mkdir(parents=True)  # as the background makes it
        if taken:
            (out / "mine.txt").write_text("mine")

    after_step(2, monkeypatch, removed)
    with pytest.raises(EyasError, match="out was removed while this process was at work there"):
        run(replace(config, out=str(out)))
    assert ((out / "mine.txt").exists() and (out / "state").exists()) if taken else not out.exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices_within_rounding(config, whole, tmp_path, monkeypatch):
    here = replace(config, out=str(tmp_path / "out"))
    stopped_at(2, here, monkeypatch)
    stopped_at(3, replace(here, dp=4), monkeypatch)
    stopped_at(4, replace(here, sp=4), monkeypatch)
    assert run(replace(here, dp=2))["steps_before"] == 4
    for line, expected in zip(lines_of(here.out), lines_of(whole), strict=True):
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(line.get(name, 0), expected.get(name, 0), rtol=1e-3)
        if "evaluation" in line:
            np.testing.assert_allclose(line["evaluation"]["loss"], expected["evaluation"]["loss"], rtol=1e-3)


def test_an_option_given_in_other_words_continues_the_run(config, whole):
    assert run(replace(config, dtype="float32", epochs=2.0))["steps_before"] == config.steps


def test_a_head_that_scores_nan_is_exported_nowhere(config, tmp_path, monkeypatch):
    score_all = together.score_all

    def nan(*args):
        return [found | {"loss": [float("nan")] * 2} for found in score_all(*args)]

    monkeypatch.setattr(together, "score_all", nan)
    told = r"of step 3 has a loss of nan on held-out rows; use a lower --learning-rate"
    with pytest.raises(EyasError, match=told):
        run(replace(config, out=str(tmp_path / "out")))
    assert not (tmp_path / "out/best").exists()


def test_another_process_in_the_folder_is_named_and_harms_nothing(config, whole):
    before = lines_of(whole)
    with locked(whole), pytest.raises(EyasError, match=rf"in use by process {os.getpid()} on .*; wait until"):
        run(config)
    assert lines_of(whole) == before


def test_a_run_killed_while_it_begins_is_no_other_experiment(config, tmp_path):
    """Its description is not whole yet."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".experiment.json.abcd1234.partial").write_text("{")
    with claimed(make_plan(replace(config, out=str(out)))):
        assert sorted(os.listdir(out)) == [".lock", "experiment.json"]


def test_another_number_of_devices_is_the_same_experiment(config):
    first, *others = (make_plan(replace(config, dp=dp, sp=sp)) for dp, sp in ((1, 1), (2, 1), (4, 1), (1, 4)))
    assert all(plan.identity == first.identity for plan in others)


def after_step(step, monkeypatch, what):
    """Calls `what` when `step` steps are done."""
    take = Trainer.take

    def taken(self, batch):
        take(self, batch)
        if self.step == step:
            what()

    monkeypatch.setattr(Trainer, "take", taken)


def test_strangers_in_best_and_last_are_told_of_and_stay(config, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"

    def strangers():
        (out / "best/.cache").mkdir()
        (out / "best/.cache/index").write_text("a tool's")
        (out / "last/notes.txt").write_text("mine")

    after_step(4, monkeypatch, strangers)
    assert run(replace(config, out=str(out)))["last"]["step"] == 7
    said = capfd.readouterr().err
    assert "last also holds notes.txt, which stays as it is" in said
    assert (out / "best/.cache/index").read_text() == "a tool's"
    assert (out / "last/notes.txt").read_text() == "mine"
    assert "training step | 7 of 7" in (out / "last/README.md").read_text()


def test_a_save_that_fails_behind_the_steps_ends_the_run_with_one_line(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    # orbax's threads outlive a failed save by this long, and Python waits for them when the tests have ended.
    monkeypatch.setattr("orbax.checkpoint._src.multihost.multihost.coordination_timeout", lambda: 5)

    def a_file():
        shutil.rmtree(out / "state")
        (out / "state").write_text("x")

    after_step(2, monkeypatch, a_file)
    with pytest.raises(EyasError, match=r"out/state.*(failed|cannot be written)") as told:
        run(replace(config, out=str(out)))
    assert told.value.exit_code == EyasError.exit_code  # a user's file is in its place; the machine is well
    assert "\n" not in str(told.value)


def test_on_a_pod_one_state_is_saved_at_a_time(tmp_path, monkeypatch):
    """Heads of a sweep would meet by one name, of which orbax and JAX make a failure."""
    state = State({"a": jnp.ones(2)}, (), jnp.int32(1), jnp.uint32(0))
    one, other = Saved(f"{tmp_path}/one"), Saved(f"{tmp_path}/other")
    finished, finish = [], Saved.finish
    monkeypatch.setattr(pod, "size", lambda: 2)
    monkeypatch.setattr(Saved, "finish", lambda self: [finished.append(self), finish(self)])
    for saved in (one, other, one):
        saved.save(state._replace(step=state.step + len(finished)), None, {"step": 0}, 0.0)
    assert finished == [one, other]
    for saved in (one, other):
        saved.close()
