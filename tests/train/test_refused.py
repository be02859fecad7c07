"""What cannot be trained is refused before anything is computed or written."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import EyasError
from common.store import Store
from tests.train import small_run, small_store
from train.planning import make_plan
from train.run import TrainConfig, run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("refused")
    return small_run.config(small_store.write_store(str(place / "store")), str(place / "run"))


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
    refused(config, tmp_path, "needs 8 devices, found 4; give a smaller --dp or --sp", dp=2, sp=4)
    refused(config, tmp_path, "each of sp=4 chips would have 6, and .* looks 6 ahead", sp=4, ttt_steps=6)
    refused(config, tmp_path, "4 attention heads and 2 of keys and values, .* give an --sp of 1, 2, 4", sp=3)
    refused(config, tmp_path, "for what is read ahead; give more --memory", memory=1e-9)
    refused(
        config,
        tmp_path,
        "teacher_temperature=2 needs all of the target's logits",
        store=made("topk", codec="topk"),
        teacher="stored",
        teacher_temperature=2.0,
    )
    small = made("small", codec="topk", last_rows=0)
    for changed, named in (
        (
            {"init": "fitted"},
            "init=fitted is a regression to last_hidden, which .* of no row .*--init target",
        ),
        ({"teacher": "recompute"}, "not dumped with all of last_hidden, .* use --teacher stored"),
        ({"teacher_temperature": 2.0}, "has the largest; give 1$"),
    ):
        refused(config, tmp_path, named, store=small, **changed)
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
    monkeypatch.setattr("train.planning.most_frequent", lambda counts, n: others)
    match = (
        r"of 183 tokens that the target would say, the draft vocabulary of 4 has none, so .* --draft-vocab"
    )
    refused(config, tmp_path, match, draft_vocab=4)


@pytest.mark.parametrize("place", ["", "/head", "/features/run", "/../{}/head"])
def test_a_store_has_no_place_for_a_head(config, place):
    out = config.store + place.format(os.path.basename(config.store))
    before = sorted(os.listdir(config.store))
    with pytest.raises(EyasError, match=r"is in the store .*name another folder"):
        run(replace(config, out=out))
    assert sorted(os.listdir(config.store)) == before


def test_held_out_states_that_are_not_finite_are_named(config, tmp_path, monkeypatch):
    row, reading = int(Store.open(config.store).split_rows("test")[-1]), Store.read

    def damaged(self, names, rows):
        found = reading(self, names, rows)
        if "last_hidden" in found:
            states = found["last_hidden"] = np.array(found["last_hidden"])
            states[np.asarray(rows) == row, 3] = np.nan
        return found

    monkeypatch.setattr(Store, "read", damaged)
    match = rf"a loss of nan on held-out rows: last_hidden of row {row} is not finite; dump .*store anew"
    with pytest.raises(EyasError, match=match):
        run(replace(config, out=str(tmp_path / "out")))


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


def test_a_run_that_would_never_end_is_refused_before_its_order_is_made(config, tmp_path):
    refused(config, tmp_path, "train rows, more than", steps=2**31 - 1)
    told = r"steps of 2 rows are \d+ epochs of \d+ train rows, more than .*, or a larger --share"
    refused(config, tmp_path, told, steps=2**26, share=0.08)
    with pytest.raises(ValueError, match=r"epochs=1e.300 must be a number of at most 1000000"):
        replace(config, steps=None, epochs=1e300)
