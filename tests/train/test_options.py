"""Options of training change what they say, in runs on a tiny store; runs with them go on as any other."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from common import storage
from common.errors import EyasError
from common.store import Store
from pipelines.compare import runs
from tests.train import small_run, small_store
from tests.train.small_run import assert_same_run, weights_of
from train import evaluate, optimizer
from train.config import EvaluateConfig
from train.planning import make_plan
from train.run import run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everything that the optimiser keeps beside the weights; six steps."""
    folder = tmp_path_factory.mktemp("options")
    return small_run.short_run(
        small_store.write_store(str(folder / "store")),
        str(folder / "whole"),
        steps=6,
        batch_rows=2,
        log_every=1,
        save_every=2,
        optimizer="muon",
        ema=0.9,
        schedule="wsd",
        cooldown=0.5,
        accumulate=2,
        noise=0.05,
        anchors=0.5,
        aux_layers=(2, 5),
        layers=2,
        fc_norm=True,
        norm_output=True,
        norm_before_residual=True,
        lm_head="tied",
        loss="lk-lambda",
        lk_decay=1.0,
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rate_that_is_not_given_is_the_optimisers_and_is_written_down(config, kind):
    plan = make_plan(replace(config, optimizer=kind, learning_rate=None))
    rate = optimizer.peak(kind, plan.head.hidden_size)
    assert plan.config.learning_rate == plan.identity["config"]["learning_rate"] == rate
    given = make_plan(replace(config, optimizer=kind, learning_rate=0.5))
    assert given.config.learning_rate == 0.5


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
def test_the_exported_head_is_the_one_that_was_trained(config, whole):
    """All that makes it another kind of head is read from its folder; a tied output has not moved."""
    found = evaluate.run(EvaluateConfig(f"{config.out}/best", config.store, ttt_steps=2, ngrams=False))
    np.testing.assert_allclose(found["head"]["alpha"], whole["best"]["alpha"], atol=0.02)
    weights, store = weights_of(config.out), Store.open(config.store)
    assert weights["fc.weight"].shape == (small_store.H, 2 * small_store.H)
    ids = weights["d2t"] + np.arange(32)
    np.testing.assert_allclose(
        weights["lm_head.weight"], store.target_tensor("embed_tokens")[ids], rtol=2**-8
    )


@pytest.mark.slow
def test_a_run_ends_where_its_head_gets_no_better(config, tmp_path, capsys):
    still = replace(
        config,
        out=str(tmp_path / "out"),
        learning_rate=1e-9,
        ema=0.0,
        layers=1,
        aux_layers=None,
        patience=2,
        eval_every=1,
    )
    found = run(still)
    assert (found["steps"], found["best"]["step"], found["last"]["step"]) == (3, 1, 3)
    assert "no better head since step 1, so the run ends at step 3" in capsys.readouterr().err
    assert runs.read(still.out, 10).state == "done"
    assert run(still)["steps_before"] == 3
    assert run(replace(still, patience=3))["steps"] == 4


def test_aux_layers_that_the_store_lacks_are_refused(config):
    for aux_layers, match in (
        ((2, 3), r"aux_layers=\[2, 3\], but .* has those of \[2, 4, 5\] and not 3"),
        ((2, 2), r"takes aux layers \[2, 2\] .* expected layers of that target in ascending order"),
        ((5, 2), r"takes aux layers \[5, 2\] .* in ascending order, as servers give them"),
    ):
        with pytest.raises(EyasError, match=match):
            make_plan(replace(config, aux_layers=aux_layers))


def test_what_a_run_is_continued_with_mixes_nothing(tmp_path, monkeypatch):
    """Every head is measured on the rows of the first; what counts for patience is what was measured, however
    often; experiment.json has every call, and a comparison shows the last one."""
    monkeypatch.setattr("train.planning.evaluations", lambda *_: (2, 4))  # of 5 held-out rows
    out = str(tmp_path / "out")
    store = small_store.write_store(str(tmp_path / "store"))
    still = small_run.short_run(store, out, eval_every=None, learning_rate=1e-9, patience=2)
    first = run(still)
    assert (first["steps"], first["best"]["step"], first["last"]["rows"]) == (6, 2, 4)
    later = run(replace(still, eval_every=1, patience=3))
    assert (later["steps_before"], later["last"]["step"], later["last"]["rows"]) == (6, 7, 4)
    assert later["last"]["evaluations_since_best"] == 3
    assert run(replace(still, eval_every=1, patience=3))["steps_before"] == 7
    found = runs.read(out, 10)
    assert (found.settings["patience"], found.settings["eval_every"], found.state) == (3, 1, "done")
    calls = storage.read_json(f"{out}/experiment.json")["calls"]
    assert [call["config"]["patience"] for call in calls] == [2, 3]


def test_anchors_without_later_steps_are_told_to_do_nothing(config, capsys):
    for steps, share, told in ((1, 0.5, True), (1, 1.0, False), (2, 0.5, False)):
        make_plan(replace(config, ttt_steps=steps, anchors=share))
        assert ("anchors=0.5 does nothing with ttt_steps=1" in capsys.readouterr().err) == told
