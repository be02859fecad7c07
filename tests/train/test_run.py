"""A run learns, goes on after any end with the same weights, and refuses what it cannot do."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from common import storage
from common.errors import EyasError
from common.store import Store
from pipelines.compare import runs
from tests.train import small_store
from tests.train.served import read_tensors
from train import evaluate, optimizer
from train.evaluate import EvaluateConfig
from train.plan import make_plan
from train.run import TrainConfig, run
from train.source import Source

KILLS = 30


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store.write_store(str(tmp_path_factory.mktemp("run") / "store"))


@pytest.fixture(scope="module")
def config(store, tmp_path_factory):
    """Small enough for a step in milliseconds; eleven steps, so that no interval divides them."""
    return TrainConfig(
        store=store,
        out=str(tmp_path_factory.mktemp("runs") / "whole"),
        steps=11,
        batch_rows=2,
        ttt_steps=3,
        draft_vocab=32,
        learning_rate=3e-2,
        log_every=1,
        eval_every=4,
        save_every=3,
        init="normal",
    )


@pytest.fixture(scope="module")
def whole(config):
    """What an uninterrupted run returns."""
    return run(config)


def lines_of(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def weights_of(out):
    return read_tensors(f"{out}/last/model.safetensors")


def assert_same_run(out, other):
    """Same weights and same metrics, but for the time they took."""
    for name, weight in weights_of(other).items():
        np.testing.assert_array_equal(weights_of(out)[name], weight, err_msg=name)
    timeless = [
        [{n: x for n, x in line.items() if n != "seconds"} for line in lines_of(o)] for o in (out, other)
    ]
    assert timeless[0] == timeless[1]


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
    elsewhere = {"epochs": "steps", "draft_vocab": "head.draft_vocab_size", "ffn": "head.ffn"}
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


def newest_state(out):
    names = storage.list_names(f"{out}/state")
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_kills_at_random_moments_leave_the_run_of_one_left_alone(long, tmp_path):
    """A third of them while it begins; each time the same command goes on."""
    rng, out = random.Random(3), str(tmp_path / "killed")
    config = replace(long, out=str(tmp_path / "whole"), steps=100 * KILLS, eval_every=45, save_every=5)
    run(config)
    for kill in range(KILLS):
        process, before = start(config, out), newest_state(out)
        while kill % 3 and newest_state(out) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3 if kill % 3 else 8))
        assert process.poll() is None, "the run is too short for so many kills"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < run(replace(config, out=out))["steps_before"] < config.steps
    assert_same_run(out, config.out)


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


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(EyasError, match=r"already holds mine.txt"):
        run(replace(config, out=str(tmp_path)))
    with pytest.raises(EyasError, match=r"mine.txt is a file; name another place"):
        run(replace(config, out=f"{tmp_path}/mine.txt"))
    assert os.listdir(tmp_path) == ["mine.txt"]


def refused(config, tmp_path, match, **changed):
    out = str(tmp_path / "out")
    with pytest.raises(EyasError, match=match):
        run(replace(config, out=out, **changed))
    assert not os.path.exists(out)


def test_what_cannot_be_trained_from_is_refused_before_anything_is_written(config, tmp_path):
    def made(name, **options):
        return small_store.write_store(str(tmp_path / name), **options)

    refused(config, tmp_path, "is no feature store", store=str(tmp_path))
    refused(config, tmp_path, "partial: 1 of 4 blocks", store=made("partial", blocks=3))
    refused(config, tmp_path, "nothing to learn from", store=made("silent", mask=0))
    refused(config, tmp_path, "nothing to learn from", store=made("short", longest=2))
    refused(config, tmp_path, "no logits to teach with", teacher="stored")
    refused(config, tmp_path, "the target has 64", draft_vocab=65)
    refused(
        config,
        tmp_path,
        "logits of 32 tokens",
        store=made("draft", codec="draft"),
        teacher="stored",
        draft_vocab=8,
    )
    refused(config, tmp_path, "name fitted, target, normal, or a head's folder", init="zeros")
    refused(config, tmp_path, "needs 64 devices", dp=64, batch_rows=64)
    refused(config, tmp_path, "for what is read ahead; give more --memory", memory=1e-9)
    refused(
        config,
        tmp_path,
        "teacher_temperature=2 needs all of the target's logits",
        store=made("topk", codec="topk"),
        teacher="stored",
        teacher_temperature=2.0,
    )
    with pytest.raises(EyasError, match="no local folder nor in a gs:// bucket"):
        run(replace(config, out="s3://bucket/run"))


def test_a_draft_vocabulary_without_what_the_target_says_is_refused_and_a_poor_one_told_of(
    config, tmp_path, monkeypatch, capsys
):
    """A head would train on a loss of 0 without a word."""
    make_plan(replace(config, draft_vocab=16))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "would say" in line]
    assert re.fullmatch(
        r"train: of 183 tokens .*vocabulary of 16 has 18\.6%; .* --draft-vocab has more", line
    )
    store = Store.open(config.store)
    said = store.read(("argmax",), store.split_rows("train"))["argmax"]
    others = np.setdiff1d(np.arange(small_store.V), said).astype(np.int32)[:4]
    monkeypatch.setattr("train.plan.most_frequent", lambda counts, n: others)
    match = (
        r"of 183 tokens that the target would say, the draft vocabulary of 4 has none, so .* --draft-vocab"
    )
    refused(config, tmp_path, match, draft_vocab=4)


def test_too_small_a_disk_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(config, tmp_path, r"heads need 1.*MB, the disk of .*out has 1.00MB left")


def test_impossible_options_name_the_field():
    for changed, match in (
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"batch_rows": 3, "dp": 2}, "batch_rows=3 must be a multiple of dp=2"),
        ({"init": ""}, "init=''"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"ttt_steps": 0}, "ttt_steps=0"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(store="s", out="o", **changed)


def test_losses_that_are_not_finite_end_the_run(config, tmp_path):
    with pytest.raises(EyasError, match=r"steps 2 to 11 were all skipped: .* use a lower --learning-rate"):
        run(
            replace(config, out=str(tmp_path / "out"), learning_rate=1e30, clip=1e30, steps=30, eval_every=30)
        )


def test_a_skipped_step_takes_no_rate_of_the_schedule(config, tmp_path, monkeypatch):
    def broken(amount, batch, seed, step):
        return batch._replace(aux_hidden=batch.aux_hidden * jnp.where(step == 1, jnp.nan, 1.0))

    monkeypatch.setattr("train.trainer.noised", broken)
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


def test_float8_features_train(config, whole, tmp_path):
    url = small_store.write_store(str(tmp_path / "store"), precision="float8_e4m3fn")
    out = str(tmp_path / "out")
    run(replace(config, store=url, out=out, steps=2))
    np.testing.assert_allclose(lines_of(out)[0]["loss_k"], lines_of(config.out)[0]["loss_k"], rtol=0.05)


def test_a_head_of_other_aux_layers_is_refused(config, whole, tmp_path, store):
    source = Source(store)
    source.store.features["aux_layers"] = [1, 4, 6]
    with pytest.raises(EyasError, match="takes aux layers"):
        evaluate.estimate(source, EvaluateConfig(f"{config.out}/best", store))


def test_a_run_that_would_never_end_is_refused_before_its_order_is_made(config, tmp_path):
    refused(config, tmp_path, "rows are more than", steps=2**31 - 1)
    with pytest.raises(ValueError, match=r"epochs=1e.300 must be a number of at most 1000000"):
        replace(config, steps=None, epochs=1e300)


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
