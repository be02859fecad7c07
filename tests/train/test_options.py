"""Options of training change what they say, in runs on a tiny store; runs with them go on as any other."""

import shutil
from dataclasses import replace

import pytest

from pipelines.compare import runs
from tests.train import small_store
from tests.train.test_run import assert_same_run
from train.config import TrainConfig
from train.run import run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everything that the optimiser keeps beside the weights; six steps."""
    folder = tmp_path_factory.mktemp("options")
    return TrainConfig(
        store=small_store.write_store(str(folder / "store")),
        out=str(folder / "whole"),
        steps=6,
        batch_rows=2,
        ttt_steps=2,
        draft_vocab=32,
        learning_rate=3e-2,
        log_every=1,
        eval_every=3,
        save_every=2,
        init="normal",
        optimizer="muon",
        ema=0.9,
        schedule="wsd",
        cooldown=0.5,
        loss="lk-lambda",
        lk_decay=1.0,
    )


@pytest.fixture(scope="module")
def whole(config):
    return run(config)


@pytest.mark.slow
def test_a_run_with_every_option_goes_on_to_the_same_weights(config, whole, tmp_path):
    """Of the averaged weights too: those are what is exported."""
    out = str(tmp_path / "again")
    run(replace(config, out=out))
    shutil.rmtree(f"{out}/state/6")  # as if it had been killed behind step 4
    assert run(replace(config, out=out))["steps_before"] == 4
    assert_same_run(out, config.out)


@pytest.mark.slow
def test_a_run_ends_where_its_head_gets_no_better(config, tmp_path, capsys):
    still = replace(config, out=str(tmp_path / "out"), learning_rate=1e-9, ema=0.0, patience=2, eval_every=1)
    found = run(still)
    assert (found["steps"], found["best"]["step"], found["last"]["step"]) == (3, 1, 3)
    assert "no better head since step 1, so the run ends at step 3" in capsys.readouterr().err
    assert runs.read(still.out, 10).state == "done"
    assert run(still)["steps_before"] == 3
    assert run(replace(still, patience=3))["steps"] == 4
