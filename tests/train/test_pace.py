"""Evaluations and checkpoints cost a twentieth of a run at most, whatever its length."""

import pytest

from tests.train import small_store
from tests.train.small_run import lines_of
from train import pace
from train.pace import Saving, evaluations
from train.run import TrainConfig, run


@pytest.mark.parametrize("steps", [1, 7, 30, 400, 12_000, 500_000])
@pytest.mark.parametrize("held_out", [1, 9, 150, 40_000])
def test_evaluations_follow_from_the_length_of_a_run(steps, held_out):
    B, T = 4, 512
    every, rows = evaluations(steps, B, T, held_out)
    count = -(-steps // every)
    assert 1 <= rows <= held_out
    assert 1 <= count <= 20
    assert rows % B == 0 or rows == held_out
    # A held-out row costs a third of a training row. A single batch is measured in any case.
    assert count == 1 or rows == held_out or rows * T >= 2**13, "a choice by a few positions is none"
    assert count * rows / 3 <= 0.025 * steps * B or (count, rows) == (1, min(B, held_out))


def test_without_held_out_rows_there_are_a_few_exports_and_of_a_short_run_one():
    assert evaluations(4_000, 4, 512, 0) == (1_000, 0)
    assert evaluations(100, 4, 512, 0) == (100, 0)


def test_saves_are_as_far_apart_as_their_cost_asks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    saving = Saving(10_000_000_000)
    assert saving.steps(1.0) >= 40 * 10  # not timed yet: at least that of a fast disk
    for seconds in (0.001, 3.0, 60.0):
        saving.begin()
        now[0] += seconds
        saving.end()
        now[0] += 5.0
        saving.end()  # told again at every step
        for step in (0.01, 1.0, 100.0):
            assert seconds <= 0.025 * step * saving.steps(step)


def test_a_run_that_is_left_to_itself_is_measured_and_saved(tmp_path):
    """Its evaluations have what it took; a run that goes on counts from where it was."""
    config = TrainConfig(
        store=small_store.write_store(str(tmp_path / "store"), rows=60),
        out=str(tmp_path / "out"),
        steps=60,
        batch_rows=2,
        ttt_steps=2,
        draft_vocab=32,
        log_every=20,
        init="normal",
    )
    found = run(config)
    lines = lines_of(config.out)
    measured = [line for line in lines if "evaluation" in line]
    every, rows = evaluations(60, 2, small_store.T, 20)
    assert rows < 20
    assert [line["step"] for line in measured] == [*range(every, 60, every), 60]
    assert [line["tokens"] for line in lines] == [line["step"] * 2 * small_store.T for line in lines]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert 0 < found["pace"] < 1
    assert run(config)["steps_before"] == 60
