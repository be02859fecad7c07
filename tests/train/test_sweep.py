"""Several heads from one stream: each is the head that it would be alone, whatever becomes of the others."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import storage
from common.errors import DamagedError, EyasError
from common.lock import locked
from common.params import initialise
from common.store import Store
from tests.train import small_run, small_store
from tests.train.small_run import ask_to_stop, assert_same_run, lines_of
from train import sweep, together
from train.evaluate import Evaluator, score_all
from train.heads.eagle3.head import Eagle3
from train.names import FAILED, LENGTH
from train.order import order
from train.plan import Plan
from train.run import run
from train.source import Source
from train.trainer import Trainer
from train.workload import Workload


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    store = small_store.write_store(str(place / "store"))
    return small_run.short_run(store, str(place / "alone"), steps=6, log_every=1, save_every=2)


def configs_of(common, out, **different):
    return {name: replace(common, out=f"{out}/{name}", **own) for name, own in different.items()}


TWO = {
    "slow": {"learning_rate": 1e-3, "seed": 5, "anchors": 0.5},
    "half": {"share": 0.5, "steps": 4, "draft_vocab": 40},
}


@pytest.fixture(scope="module")
def alone(common, tmp_path_factory):
    """The folder of what each of the two gives by itself."""
    out = str(tmp_path_factory.mktemp("alone"))
    for config in configs_of(common, out, **TWO).values():
        run(config)
    return out


def test_each_head_is_what_it_is_alone_and_the_store_is_read_once(common, alone, tmp_path, monkeypatch):
    read, reading = [], Store.read

    def counted(self, names, rows):
        if "aux_hidden" in names:
            read.extend(np.asarray(rows).tolist())
        return reading(self, names, rows)

    monkeypatch.setattr(Store, "read", counted)
    out = str(tmp_path / "out")
    found = sweep.run(configs_of(common, out, **TWO), out)
    assert (found["done"], found["failed"]) == (["slow", "half"], {})
    for name in TWO:
        assert_same_run(f"{out}/{name}", f"{alone}/{name}")
    store = Store.open(common.store)
    rows = store.split_rows("train")
    work = Workload(store, rows, common.ttt_steps).targets[rows]
    shapes = (6, 4, 1.0), (4, 4, 0.5)
    wanted = np.concatenate([order(rows, 0, *shape, work).places.ravel() for shape in shapes])
    sampled = len(rows) + len(rows) // 2  # for the units of the inputs
    assert len([row for row in read if row in rows]) == len(np.unique(wanted)) + sampled


def test_stopped_it_goes_on_and_what_is_added_is_all_that_runs(common, alone, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    configs = configs_of(common, out, **TWO)
    with monkeypatch.context() as patch:
        ask_to_stop(patch, Trainer, "take", lambda trainer, _: trainer.name == "slow" and trainer.step == 3)
        with pytest.raises(EyasError, match=r"sweep stopped; every head is saved at step [12] or later"):
            sweep.run(configs, out)
    sweep.run(configs, out)
    for name in TWO:
        assert_same_run(f"{out}/{name}", f"{alone}/{name}")
    before = {name: os.stat(f"{out}/{name}/last/model.safetensors").st_mtime_ns for name in TWO}
    capsys.readouterr()
    more = configs | configs_of(common, out, added={"seed": 7, "steps": 1})
    assert sweep.run(more, out)["done"] == ["slow", "half", "added"]
    assert "sweep: 1 of 3 heads to train, 0 failed before" in capsys.readouterr().err
    for name, time in before.items():
        assert os.stat(f"{out}/{name}/last/model.safetensors").st_mtime_ns == time
    assert lines_of(f"{out}/added")[0]["step"] == 1


def test_stopped_in_its_last_evaluation_it_is_not_done(common, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    configs = configs_of(replace(common, steps=1), out, a={})
    with monkeypatch.context() as patch:
        ask_to_stop(patch, together, "score_all")
        with pytest.raises(EyasError, match="sweep stopped; every head is saved at step 1"):
            sweep.run(configs, out)
    assert not os.path.exists(f"{out}/a/best")
    assert sweep.run(configs, out)["done"] == ["a"]
    assert "evaluation" in lines_of(f"{out}/a")[-1]
    assert os.path.exists(f"{out}/a/best/config.json")


def test_one_that_comes_to_nothing_ends_alone_and_says_why(common, alone, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    configs = configs_of(common, out, bad={}, **TWO)
    take = Trainer.take

    def fails(self, batch):
        take(self, batch)
        if self.name == "bad" and self.step == 2:
            raise EyasError("the loss is nan at step 2; use a lower --learning-rate")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", fails)
        found = sweep.run(configs, out)
    assert found["failed"] == {"bad": "the loss is nan at step 2; use a lower --learning-rate"}
    assert found["done"] == ["slow", "half"]
    for name in TWO:
        assert_same_run(f"{out}/{name}", f"{alone}/{name}")
    assert storage.read_json(f"{out}/bad/{FAILED}")["step"] == 2
    assert sweep.run(configs, out)["failed"] == found["failed"], "it is left alone"
    os.remove(f"{out}/bad/{FAILED}")
    assert sweep.run(configs, out)["failed"] == {}


def test_one_whose_state_is_damaged_ends_alone_and_says_what_to_delete(common, alone, tmp_path):
    out = str(tmp_path / "out")
    shutil.copytree(alone, out)
    with open(f"{out}/slow/state/6/noted/metadata", "w") as file:
        file.write("{")
    found = sweep.run(configs_of(common, out, **TWO), out)
    assert found["done"] == ["half"]
    assert f"{out}/slow/state/6" in found["failed"]["slow"]
    assert "to continue from the state before it" in found["failed"]["slow"]


def test_what_cannot_be_is_refused_by_the_experiments_name_and_nothing_is_written(common, tmp_path):
    out = str(tmp_path / "out")
    for own, match in (
        ({"draft_vocab": 65}, "experiment b: .*the target has 64"),
        ({"teacher": "stored"}, "experiment b: .*no logits to teach with"),
    ):
        with pytest.raises(EyasError, match=match):
            sweep.run(configs_of(common, out, a={}, b=own), out)
    assert not os.path.exists(out)
    run(replace(common, steps=1, out=f"{out}/b"))
    with pytest.raises(EyasError, match=r"b holds another experiment: .*seed: 0 there, 1 here"):
        sweep.run(configs_of(common, out, a={}, b={"seed": 1, "steps": 1}), out)
    assert os.listdir(out) == ["b"]
    with pytest.raises(EyasError, match="is a run and no folder of runs"):
        sweep.run(configs_of(common, f"{out}/b", a={}), f"{out}/b")
    with locked(f"{out}/b"), pytest.raises(EyasError, match="in use by"):
        sweep.run(configs_of(common, out, b={"steps": 1}, c={}), out)


def test_heads_that_are_measured_on_other_parts_of_the_held_out_rows_are_what_they_are_alone(tmp_path):
    """How many rows are measured follows from the length of a run, so it differs within a sweep."""
    source = Source(small_store.write_store(str(tmp_path / "store"), rows=33))
    ids = np.arange(40, dtype=np.int32)
    head = Eagle3.for_target(source.store.target_config(), len(ids), small_store.AUX_LAYERS)
    weights = initialise(head.parameters(), jax.random.key(1))
    measured = [
        (
            Evaluator(source, head, ids, 1, 4, jnp.float32, count=count),
            weights,
            source.frozen(ids, "recompute", "float32"),
        )
        for count in (4, None, 8)
    ]
    alone = [score_all([one], "alone")[0] for one in measured]
    assert len({one["counted"] for one in alone}) == 3
    assert score_all(measured, "together") == alone


def test_where_all_come_to_nothing_at_once_each_says_why(common, tmp_path, monkeypatch):
    def damaged(self, plan):
        raise EyasError("the state is damaged")

    monkeypatch.setattr(sweep.Trainer, "__init__", damaged)
    out = str(tmp_path / "out")
    assert sweep.run(configs_of(common, out, a={}, b={"seed": 1}), out)["failed"] == dict.fromkeys(
        "ab", "the state is damaged"
    )


def test_damage_of_the_store_is_no_heads_failure(common, tmp_path, monkeypatch):
    def damaged(self):
        raise DamagedError("rows 3: damaged on disk")

    monkeypatch.setattr(Plan, "sample", damaged)
    out = str(tmp_path / "out")
    with pytest.raises(DamagedError):
        sweep.run(configs_of(common, out, a={}, b={"seed": 1}), out)
    assert not os.path.exists(f"{out}/a/{FAILED}")


def test_the_machines_failure_ends_all(common, tmp_path, monkeypatch):
    """A full disk is no experiment's fault."""
    from common.errors import MachineError

    def full(self):
        raise MachineError("the disk is full")

    monkeypatch.setattr(together.Trainer, "save", full)
    out = str(tmp_path / "out")
    with pytest.raises(MachineError, match="the disk is full"):
        sweep.run(configs_of(common, out, a={"steps": 1}, b={"steps": 1}), out)
    assert not os.path.exists(f"{out}/a/{FAILED}")


def test_chips_without_room_end_all_with_what_needs_less(common, tmp_path, monkeypatch):
    def full(self, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nmore")

    monkeypatch.setattr(Trainer, "take", full)
    out = str(tmp_path / "out")
    configs = configs_of(common, out, a={"steps": 1}, b={"steps": 1})
    with pytest.raises(EyasError, match=r"the chips .*5 bytes\); give an --at-once below 2, or a"):
        sweep.run(configs, out)
    assert not os.path.exists(f"{out}/a/{FAILED}")
    with pytest.raises(EyasError, match=r"the chips .*; give a larger --dp or --accumulate, fewer"):
        run(replace(configs["a"], out=f"{out}/alone"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_differs_each_head_is_what_it_is_alone(common, tmp_path):
    different = {
        "same": {},
        "seed": {"seed": 3},
        "rate": {"learning_rate": 1e-3, "warmup": 0.5},
        "steps": {"ttt_steps": 4, "decay": 0.5},
        "vocabulary": {"draft_vocab": 50},
        "small": {"ffn": 32},
        "fitted": {"init": "fitted"},
        "fifth": {"share": 0.2, "steps": 2},
        "long": {"steps": 11},
        "mask": {"compat": "specforge"},
        "parts": {"accumulate": 2, "noise": 0.1, "seed": 2},
        "muon": {"optimizer": "muon", "ema": 0.9},
        "wsd": {"schedule": "wsd", "cooldown": 0.5, "weight_decay": 0.1, "clip": 0.1},
        "loss": {"loss": "lk-lambda", "lk_decay": 1.0},
        "kind": {"fc_norm": True, "norm_output": True, "layers": 2},
        "frozen": {"lm_head": "frozen", "norm_before_residual": True},
        "layers": {"aux_layers": (2, 5), "share": 0.5, "steps": 4},
        "patient": {"patience": 1, "eval_every": 1, "learning_rate": 1.0, "steps": 9},
    }
    out, by_itself = str(tmp_path / "out"), str(tmp_path / "alone")
    assert sweep.run(configs_of(common, out, **different), out, at_once=7)["failed"] == {}
    for name, config in configs_of(common, by_itself, **different).items():
        run(config)
        assert_same_run(f"{out}/{name}", f"{by_itself}/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["topk", "draft", "full"])
def test_other_teachers_losses_and_optimisers_share_a_stream_and_nothing_else(tmp_path, codec):
    store = small_store.write_store(str(tmp_path / "store"), codec, "int8")
    same = small_run.short_run(store, str(tmp_path), steps=2, log_every=1, eval_every=2, ttt_steps=2)
    stored = {"teacher": "stored", "loss": "lk-alpha", "optimizer": "adamw", "anchors": 0.5}
    different = {
        "stored": stored | {"draft_vocab": None if codec == "draft" else 48},
        "whole": {"optimizer": "muon", "loss": "forward-kl", "draft_vocab": 40, "lm_head": "frozen"},
    }
    out, by_itself = str(tmp_path / "out"), str(tmp_path / "alone")
    assert sweep.run(configs_of(same, out, **different), out)["failed"] == {}
    for name, config in configs_of(same, by_itself, **different).items():
        run(config)
        assert_same_run(f"{out}/{name}", f"{by_itself}/{name}")


@pytest.mark.slow
def test_heads_of_one_shape_have_one_program(common, tmp_path, monkeypatch):
    """Other seeds, rates, schedules and shares are other data; another loss is another program."""
    compiled, program = [], Source.program

    def counted(self, lowered, compile):
        return program(self, lowered, lambda: compiled.append(1) or compile())

    monkeypatch.setattr(Source, "program", counted)
    different = {
        "a": {},
        "seed": {"seed": 4},
        "rate": {"learning_rate": 1e-4, "schedule": "linear", "warmup": 0.5},
        "steps": {"steps": 3},
        "loss": {"loss": "reverse-kl"},
    }
    short = replace(common, steps=2, eval_every=2)
    out = str(tmp_path / "out")
    assert sweep.run(configs_of(short, out, **different), out)["failed"] == {}
    assert len(compiled) == 2


def test_no_head_is_called_the_best_before_one_was_measured():
    def head(name, best=None, status="loss 1"):
        return SimpleNamespace(name=name, exported=SimpleNamespace(best=best), status=status)

    measured, kept = {"step": 3, LENGTH: 2.0}, {"step": 3}
    for heads, said in (
        ([head("a", status=""), head("b")], "2 heads"),
        ([head("a"), head("b")], "2 heads, a: loss 1"),
        ([head("a", kept), head("b", kept)], "2 heads, a: loss 1"),  # nothing is held out
        ([head("a"), head("b", measured)], "2 heads, b is best: loss 1"),
        ([head("a")], "loss 1"),
        ([], ""),
    ):
        assert together._status(heads) == said
