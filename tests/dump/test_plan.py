"""What a dump cannot do is refused in one line, before anything is written."""

import os
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from common import fit_size, storage
from common.errors import EyasError
from common.store import Store
from dump import plan as planning
from dump.dump import DumpConfig, run
from dump.rounds import deal
from tests.dump import tiny
from tests.dump.tiny import contents


def test_memory_that_does_not_suffice_is_one_line_and_nothing_is_begun(config, monkeypatch):
    before = contents(config.store)
    too_much = lambda *_: jax.block_until_ready(jnp.zeros((2**44,), jnp.uint8))  # noqa: E731
    monkeypatch.setattr("dump.prefill.Program.compile", too_much)
    with pytest.raises(EyasError, match=r"memory of the chips .* \(--chip-tokens, --batch-rows\)"):
        run(config)
    assert contents(config.store) == before


@pytest.mark.parametrize("array", ["tokens", "positions", "segment_ids", "loss_mask"])
def test_damaged_rows_are_refused_before_they_are_computed(config, array):
    with open(f"{config.store}/rows/{array}/c/0/0", "r+b") as file:
        file.write(b"\7")
    with pytest.raises(EyasError, match=rf"{array} rows \[0\]: damaged on disk"):
        run(config)
    assert Store.open(config.store).committed() == set()


@pytest.mark.parametrize("block_rows", [1, 4])
def test_the_last_state_is_kept_of_as_many_targets_as_a_start_is_fitted_to(config, monkeypatch, block_rows):
    monkeypatch.setattr(fit_size, "_PER_FEATURE", 1)
    config = replace(config, logits="topk", topk=4, last_hidden="first", block_rows=block_rows)
    kept = planning.make_plan(config).codec.last_rows
    masks = Store.open(config.store).read(("loss_mask",), range(kept))["loss_mask"]
    features = 4 * tiny.H
    assert masks[:-block_rows].sum() < features <= masks.sum()
    monkeypatch.setattr(fit_size, "_MOST_POSITIONS", 2 * tiny.T)
    assert planning.make_plan(config).codec.last_rows == max(2, block_rows)


YARN = {"rope_type": "yarn", "factor": 4.0}


def test_documents_longer_than_the_targets_positions_are_refused(config):
    """Rows may be longer: positions restart in every document."""
    place = f"{config.model}/config.json"
    raw = storage.read_json(place)
    longest, before = tiny.T // 2 - 3, contents(config.store)
    for change, limit in (
        ({}, longest - 1),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, (longest - 1) // 2),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2}}, longest - 1),
    ):
        storage.write_json(place, raw | {"max_position_embeddings": limit} | change)
        with pytest.raises(EyasError, match=rf"document of {longest} tokens, but .* --length \d+ or less"):
            run(config)
    assert contents(config.store) == before
    extended = {"max_position_embeddings": 4, "rope_scaling": YARN | {"original_max_position_embeddings": 4}}
    for change in ({"max_position_embeddings": longest}, extended):
        storage.write_json(place, raw | change)
        assert len(planning.make_plan(config).blocks) == 3


def test_other_options_are_refused_by_field(config, tmp_path):
    run(config)
    before = contents(config.store)
    for change, named in (
        ({"topk": 5}, r"codec\.size: 4 there, 5 here"),
        ({"aux_layers": (1, 2)}, r"aux_layers: \[2, 4, 5\] there, \[1, 2\] here"),
        ({"precision": "bfloat16"}, 'precision: "int8" there, "bfloat16" here'),
        ({"model": tiny.write_model(f"{tmp_path}/other", seed=1)}, r"target\.weights_hash"),
    ):
        with pytest.raises(EyasError, match=f"was dumped otherwise: {named}.*or a new store"):
            run(replace(config, **change))
    os.rename(config.model, f"{tmp_path}/renamed")
    run(replace(config, model=f"{tmp_path}/renamed"))
    assert contents(config.store) == before


def test_bad_input_writes_nothing(config, tmp_path):
    before = contents(config.store)
    few = tiny.write_model(f"{tmp_path}/few", layers=6)
    storage.write_json(f"{tmp_path}/empty/config.json", {})
    other = tiny.write_model(f"{tmp_path}/other")
    storage.write_json(f"{other}/tokenizer.json", {"name": "another"})
    broken = tiny.write_model(f"{tmp_path}/broken")
    os.truncate(f"{broken}/model.safetensors", 40_000)
    for change, message in (
        ({"model": few}, "6 layers; the default aux layers need at least 7"),
        ({"model": f"{tmp_path}/nowhere"}, "config.json is missing"),
        ({"model": f"{tmp_path}/empty"}, "supported: "),
        ({"model": other}, "made with another tokenizer"),
        ({"model": broken}, "cut off"),
        ({"store": f"{tmp_path}/nowhere"}, "is no feature store"),
        ({"topk": 100}, "topk=100, but the target has 64 tokens"),
        ({"logits": "draft", "topk": 64}, "draft_vocab=32000, but the target has 64 tokens"),
        ({"aux_layers": (3, 99)}, "aux_layers"),
        ({"dp": 8, "block_rows": 8}, "needs 8 devices"),
    ):
        with pytest.raises(EyasError, match=message) as found:
            run(replace(config, **change))
        assert "\n" not in str(found.value)
    assert contents(config.store) == before


@pytest.mark.parametrize(
    "change",
    [
        {"logits": "some"},
        {"precision": "int4"},
        {"last_hidden": "some"},
        {"last_hidden": "none", "logits": "none", "topk": 64},
        {"last_hidden": "first", "logits": "full", "topk": 64},
        {"dtype": "float64"},
        {"topk": 0},
        {"topk": 5, "logits": "none"},
        {"draft_vocab": 5},
        {"batch_rows": 3},
        {"dp": 3},
        {"share": "0/2"},
        {"share": "3/2"},
        {"share": "half"},
    ],
)
def test_bad_options_are_named(config, change):
    with pytest.raises(ValueError, match=next(iter(change)) if "dp" not in change else "block_rows=4"):
        planning.make_plan(replace(config, **change))


def test_default_batches_divide_blocks():
    config = DumpConfig("m", "s")
    assert [config.batch(length, 1) for length in (512, 2048, 700, 10)] == [4, 1, 2, 32]
    assert replace(config, dp=2, tp=8).batch(512, 16) == 32
    assert replace(config, dp=2, tp=8).batch(512, 4) == 64
    assert replace(config, dp=2, tp=4).batch(2048, 8) == 8
    assert replace(config, dp=3).batch(512, 2, 1) == 12
    with pytest.raises(ValueError, match="multiple of the 3 rows that a process with 3 of 4 chips"):
        replace(config, dp=4).batch(512, 1, 3)
    assert [deal((0, 1, 2, 5, 7), p, 2) for p in (0, 1)] == [(0, 2, 7), (1, 5)]


def test_the_largest_numbers_are_planned_at_once(config):
    """A prime number of rows has no parts; they are not looked for one by one."""
    start = time.monotonic()
    planning.make_plan(replace(config, block_rows=2**31 - 1, chip_tokens=2**31 - 1))
    assert time.monotonic() - start < 20


def test_rows_that_have_no_parts_for_objects_are_refused(config, monkeypatch):
    """Rows of a prime number of tokens, each larger than an object, would be an object a token."""
    before = contents(config.store)
    monkeypatch.setattr("common.zarr.CHUNK_BYTES", 200)
    monkeypatch.setattr("common.zarr.SHARD_BYTES", 200)
    with pytest.raises(EyasError, match=r"aux_hidden would be 24 objects .* prepare with --length 256"):
        run(replace(config, precision="float32"))
    assert contents(config.store) == before


def test_too_small_a_disk_is_refused_before_the_run(config, monkeypatch):
    before = contents(config.store)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 70_000}))
    with pytest.raises(EyasError, match=r"need 77\.6kB, the disk of .* has 70\.0kB left; use --precision"):
        run(replace(config, precision="float32"))
    assert contents(config.store) == before
