"""A run learns, and goes on after any end with the same weights."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from common import storage
from common.errors import EyasError
from common.store import Store
from pipelines.compare import runs
from tests.train import small_run, small_store
from tests.train.small_run import assert_same_run, lines_of
from train import evaluate, optimizer
from train.evaluate import EvaluateConfig
from train.experiment import claimed
from train.heads import KINDS, settings_of
from train.planning import make_plan
from train.run import TrainConfig, run
from train.source import Source


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store.write_store(str(tmp_path_factory.mktemp("run") / "store"))


@pytest.fixture(scope="module")
def config(store, tmp_path_factory):
    return small_run.config(store, str(tmp_path_factory.mktemp("runs") / "whole"))


@pytest.fixture(scope="module")
def whole(config):
    """What an uninterrupted run returns."""
    return run(config)


def test_a_run_learns_and_leaves_what_it_says(config, whole):
    lines = lines_of(config.out)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 12))
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    measured = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in measured] == [4, 8, 11]
    best = max((line["evaluation"] for line in measured), key=lambda found: found["length_greedy"])
    assert whole["best"] == best
    assert whole["last"]["step"] == whole["steps"] == 11
    assert whole["best"]["length_greedy"] > measured[0]["evaluation"]["length_greedy"] > 1
    left = [".lock", "best", "experiment.json", "last", "metrics.jsonl", "state"]
    assert sorted(os.listdir(config.out)) == left
    card = storage.read_bytes(f"{config.out}/best/README.md").decode()
    how = "(chain of 3, held-out answers walked through as a server does)"
    assert f"temperature 0 {how} | {best['length_greedy']:.4g} |" in card
    kept = storage.read_json(f"{config.out}/experiment.json")
    (call,) = kept["calls"]
    assert shlex.split(call["command"])[1:] == sys.argv[1:]
    assert call["config"]["learning_rate"] == 3e-2
    assert kept["identity"]["store"] == Store.open(config.store).hash


def test_a_checkout_that_is_not_installed_trains_and_says_so(config, whole, tmp_path, monkeypatch):
    def of_others(package):
        if package == "eyas":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("train.experiment.version", of_others)
    with claimed(make_plan(replace(config, out=str(tmp_path / "out")))):
        (call,) = storage.read_json(f"{tmp_path}/out/experiment.json")["calls"]
    assert call["versions"]["eyas"] == "not installed"
    assert call["versions"]["jax"] == version("jax")


def test_a_comparison_reads_what_a_run_writes(config, whole):
    found = runs.read(config.out, 100)
    assert (found.state, found.step, found.planned) == ("done", 11, 11)
    assert (found.best.values, found.last.values) == (whole["best"], whole["last"])
    last = [line for line in lines_of(config.out) if "loss" in line][-1]
    assert (found.tokens, found.seconds, found.loss) == (last["tokens"], last["seconds"], last["loss"])
    for curve, names in ((found.trained, runs.TRAINED), (found.evaluated, runs.EVALUATED)):
        assert all(np.isfinite(curve.mean[name]).all() for name in names)
        assert np.isfinite(curve.seconds).all()
    assert found.evaluated.tokens.tolist() == [4 * 48, 8 * 48, 11 * 48]
    assert found.steps_drafted == 3
    # Two configurations that differ in a field differ in what is compared.
    elsewhere = {"epochs": "steps", "draft_vocab": "head.draft_vocab_size"}
    elsewhere |= {name: f"head.{name}" for kind in KINDS for name in settings_of(kind)}
    places = {"store", "out", "cache", "memory", "log_to"}
    wanted = {elsewhere.get(field.name, field.name) for field in fields(TrainConfig)} - places
    assert wanted <= found.settings.keys()


def test_evaluating_best_gives_what_training_said(config, whole, store):
    found = evaluate.run(EvaluateConfig(f"{config.out}/best", store, ttt_steps=3, batch_rows=4))
    # The folder holds bfloat16, so a near tie may fall the other way.
    np.testing.assert_allclose(found["head"]["acc"], whole["best"]["acc"], atol=0.03)
    np.testing.assert_allclose(found["head"]["alpha"], whole["best"]["alpha"], atol=0.02)
    assert found["head"]["counted"] == whole["best"]["counted"] == found["bigram"]["counted"]
    assert found["head"]["length_greedy"] > found["unigram"]["length_greedy"]
    meshed = evaluate.run(
        EvaluateConfig(f"{config.out}/best", store, ttt_steps=3, batch_rows=4, dp=2, ngrams=False)
    )
    np.testing.assert_allclose(meshed["head"]["alpha"], found["head"]["alpha"], rtol=1e-4)


def test_a_finished_run_is_left_alone(config, whole):
    before = storage.read_bytes(f"{config.out}/best/model.safetensors")
    again = run(config)
    assert (again["steps_before"], again["best"], again["last"]) == (11, whole["best"], whole["last"])
    assert storage.read_bytes(f"{config.out}/best/model.safetensors") == before


def start(config, out):
    """The run by the command line, in a process of its own."""
    options = {
        "store": config.store,
        "out": out,
        "steps": config.steps,
        "batch-rows": 2,
        "ttt-steps": 3,
        "draft-vocab": 32,
        "optimizer": config.optimizer,
        "learning-rate": 3e-2,
        "eval-every": config.eval_every,
        "save-every": config.save_every,
        "init": "normal",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "train",
        "--model",
        f"{config.store}/target",
        *arguments,
    ]
    log = open(f"{out}.log", "w", encoding="utf-8")  # noqa: SIM115 (the process writes it)
    process = subprocess.Popen(command, stderr=log, stdout=log, env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"})
    log.close()
    return process


def wait_for_state(process, out, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, storage.read_bytes(f"{out}.log").decode()[-2000:]
        if any(name.isdigit() and int(name) >= step for name in storage.list_names(f"{out}/state")):
            return
        time.sleep(0.01)
    raise AssertionError(storage.read_bytes(f"{out}.log").decode()[-2000:])


@pytest.fixture(scope="module")
def long(config, tmp_path_factory):
    long = replace(config, out=str(tmp_path_factory.mktemp("long") / "whole"), steps=90, log_every=10)
    long = replace(long, eval_every=40, save_every=7)
    run(long)
    return long


def test_a_killed_run_goes_on_to_the_same_weights(long, tmp_path):
    out = str(tmp_path / "killed")
    process = start(long, out)
    wait_for_state(process, out, 14)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = run(replace(long, out=out))
    assert 14 <= result["steps_before"] < 90
    assert_same_run(out, long.out)


def test_a_stopped_run_saves_its_state_and_says_so_in_one_line(long, tmp_path):
    out = str(tmp_path / "stopped")
    process = start(long, out)
    wait_for_state(process, out, 7)
    process.send_signal(signal.SIGTERM)  # what a pre-empted machine sends; Ctrl-C goes the same way
    assert process.wait() == 42
    said = storage.read_bytes(f"{out}.log").decode()
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("Error: train stopped; step ")
    step = int(last.split("step ")[1].split()[0])
    result = run(replace(long, out=out))
    assert result["steps_before"] == step
    assert_same_run(out, long.out)


def test_another_experiment_in_the_folder_is_refused(config, whole):
    with pytest.raises(EyasError, match=r"config.learning_rate: 0.03 there, 0.001 here"):
        run(replace(config, learning_rate=1e-3))
    with pytest.raises(EyasError, match=r"steps: 11 there, 12 here"):
        run(replace(config, steps=12))


def test_losses_that_are_not_finite_end_the_run(config, tmp_path):
    with pytest.raises(EyasError, match=r"steps 2 to 11 were all skipped: .* use a lower --learning-rate"):
        run(
            replace(config, out=str(tmp_path / "out"), learning_rate=1e30, clip=1e30, steps=30, eval_every=30)
        )


def test_a_skipped_step_takes_no_rate_of_the_schedule(config, tmp_path, monkeypatch):
    def broken(batch, seed, step):
        return batch._replace(aux_hidden=batch.aux_hidden * jnp.where(step == 1, jnp.nan, 1.0))

    monkeypatch.setattr("train.trainer.with_draws", broken)
    here = replace(config, out=str(tmp_path / "out"), steps=4, eval_every=4, log_every=1)
    run(here)
    found = [(line["step"], line["learning_rate"]) for line in lines_of(here.out) if "loss" in line]
    rate = optimizer.schedule(here.learning_rate, here.warmup, 4)
    assert found == [(1, rate(0)), (3, rate(1)), (4, rate(2))]


def test_without_held_out_rows_best_is_the_last(config, tmp_path):
    url = small_store.write_store(str(tmp_path / "store"), test=False)
    found = run(replace(config, store=url, out=str(tmp_path / "out"), steps=2))
    assert found["best"]["step"] == 2
    with pytest.raises(EyasError, match="no held-out rows"):
        evaluate.run(EvaluateConfig(str(tmp_path / "out/best"), url))


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"codec": "draft"}, {"teacher": "stored", "draft_vocab": None}),
        ({"codec": "full"}, {"teacher": "stored"}),
        ({"codec": "topk"}, {"teacher": "stored"}),
        ({}, {"dp": 2}),
    ],
)
def test_stored_logits_and_meshes_give_the_same_losses(config, whole, tmp_path, options, changed):
    url = small_store.write_store(str(tmp_path / "store"), **options)
    out = str(tmp_path / "out")
    run(replace(config, store=url, out=out, steps=3, **changed))
    # The learning rate's schedule depends on the number of steps, so only the first losses compare.
    np.testing.assert_allclose(lines_of(out)[0]["loss_k"], lines_of(config.out)[0]["loss_k"], rtol=2e-4)


@pytest.mark.parametrize(("precision", "off"), [("float8_e4m3fn", 0.05), ("int8", 0.02)])
def test_features_of_8_bits_train(config, whole, tmp_path, precision, off):
    url = small_store.write_store(str(tmp_path / "store"), precision=precision)
    out = str(tmp_path / "out")
    run(replace(config, store=url, out=out, steps=2))
    np.testing.assert_allclose(lines_of(out)[0]["loss_k"], lines_of(config.out)[0]["loss_k"], rtol=off)


def test_the_largest_logits_teach_and_measure_without_the_last_state(config, whole, tmp_path, capsys):
    """Of all tokens, as many as the target has: then nothing is lost with the state."""
    url = small_store.write_store(str(tmp_path / "store"), "topk", last_rows=0)
    assert "last_hidden" not in Store.open(url).features["arrays"]
    out = str(tmp_path / "out")
    run(replace(config, store=url, out=out, steps=3))
    np.testing.assert_allclose(lines_of(out)[0]["loss_k"], lines_of(config.out)[0]["loss_k"], rtol=2e-4)
    head = f"{config.out}/best"
    wanted = evaluate.run(EvaluateConfig(head, config.store))["head"]
    got = evaluate.run(EvaluateConfig(head, url))["head"]
    assert f"what is sampled is at most: {small_store.V} logits are known" in capsys.readouterr().err
    assert got["sampled_at_most"]
    assert "sampled_at_most" not in wanted
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=2e-3, err_msg=name)


def test_a_fitted_start_needs_the_last_state_of_some_rows_alone(config, tmp_path):
    """It is that of a store of all of them whose run is on those rows."""
    found = []
    for name, count in (("some", 8), ("all", None)):
        url = small_store.write_store(str(tmp_path / name), "topk", last_rows=count)
        source = Source(url)
        assert source.store.rows_with("last_hidden") == (count or small_store.ROWS)
        source.train_rows = source.train_rows[source.train_rows < 8] if count is None else source.train_rows
        plan = make_plan(replace(config, store=url, out=str(tmp_path / "out"), init="fitted"), source)
        assert plan.view.teacher == ("stored" if count else "recompute")
        found.append(plan.sample().fit)
    for some, every in zip(*found, strict=True):
        np.testing.assert_allclose(some, every, rtol=1e-4, atol=1e-5)


def test_a_head_of_other_aux_layers_is_refused(config, whole, tmp_path, store):
    source = Source(store)
    source.store.features["aux_layers"] = [1, 4, 6]
    with pytest.raises(EyasError, match="takes aux layers"):
        evaluate.estimate(source, EvaluateConfig(f"{config.out}/best", store))


@pytest.mark.slow
def test_another_seed_compiles_nothing(config, tmp_path):
    """What seeds decide is data of every program: of the start, of noise, of steps and of evaluations."""
    there = {
        "jax_compilation_cache_dir": str(tmp_path / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in there}

    def keep(settings):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    def programs(seed):
        short = {"steps": 2, "eval_every": 2, "noise": 0.1, "init": "fitted"}
        run(replace(config, out=str(tmp_path / str(seed)), seed=seed, data_seed=seed, **short))
        return {name for name in os.listdir(tmp_path / "programs") if name.endswith("-cache")}

    keep(there)
    try:
        first = programs(3)
        assert len(first) > 3
        assert {name.split("-")[0] for name in programs(4) - first} == set()
    finally:
        keep(before)
