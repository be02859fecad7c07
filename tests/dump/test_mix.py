"""Several sources of conversations: how much of each is used, and how the index names them."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import EyasError
from common.store import Store
from dump.prepare import run
from tests.dump.chats import CHATS, chat


@pytest.fixture
def config(prepare_config):
    return prepare_config


def test_several_files_are_one_data_set(config, tmp_path):
    lines = CHATS.read_text().splitlines()
    for name, part in (("a.jsonl", lines[:10]), ("b.jsonl", lines[10:])):
        (tmp_path / name).write_text("\n".join(part))
    rows = run(replace(config, data=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))))
    assert rows["counts"]["read"] == 34
    assert [source["name"] for source in rows["data"]] == ["a.jsonl", "b.jsonl"]


@pytest.fixture
def two(tmp_path):
    """A file of 30 conversations and one of 20, of which 5 are in the first one too."""
    lines = [chat(("human", f"What is {n} + 1?"), ("gpt", f"It is {n + 1}.")) for n in range(45)]
    for name, part in (("a.jsonl", lines[:30]), ("b.jsonl", lines[25:])):
        (tmp_path / name).write_text("\n".join(part))
    return tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))


@pytest.mark.parametrize(
    ("settings", "kept", "dropped"),
    [
        ({}, [30, 15], 0),
        ({"take": (10, 9)}, [10, 9], 0),
        ({"take": (10, 999)}, [10, 20], 0),
        ({"mix": (1, 1)}, [15, 15], 15),
        ({"mix": (4, 1)}, [30, 7], 8),
        ({"mix": (0.5, 5)}, [1, 15], 29),
        ({"take": (12, 4), "mix": (2, 1)}, [8, 4], 4),
        ({"max_conversations": 12, "mix": (2, 1)}, [8, 4], 0),
        ({"max_conversations": 11, "mix": (1, 1)}, [5, 5], 2),
        ({"max_conversations": 12, "take": (10, 9)}, [10, 2], 0),
    ],
)
def test_of_each_source_as_much_is_used_as_is_wanted_and_the_index_names_it(
    config, two, settings, kept, dropped
):
    rows = run(replace(config, data=two, **settings))
    store = Store.open(config.store)
    index = store.index().to_pylist()
    assert np.bincount([line["source"] for line in index]).tolist() == kept
    assert (rows["counts"]["kept"], rows["counts"]["dropped_mix"]) == (sum(kept), dropped)
    assert all(rows["data"][line["source"]]["name"] == line["id"].split("#")[0] for line in index)
    assert rows["tokens"] == sum(line["length"] for line in index)
    arrays = store.read(["tokens", "loss_mask"], store.split_rows("train"))
    counted = np.bincount(arrays["tokens"][arrays["loss_mask"] == 1], minlength=rows["vocab_size"])
    np.testing.assert_array_equal(store.token_counts(), counted)
    lost = sum(n for name, n in rows["counts"].items() if name.startswith("dropped_"))
    assert rows["counts"]["read"] == rows["counts"]["kept"] + lost


def test_a_mix_has_one_of_each_source_and_no_more_than_is_wanted(config, two, tmp_path):
    third = tmp_path / "c.jsonl"
    third.write_text(chat(("human", "Which?"), ("gpt", "That.")))
    mixed = replace(config, data=(*two, str(third)), mix=(1000, 1, 1), max_conversations=10)
    assert run(mixed)["counts"]["kept"] == 10
    with pytest.raises(ValueError, match=r"^max_conversations=2 is less than one of each of the 3 --data"):
        replace(mixed, max_conversations=2)


def test_a_source_with_nothing_to_mix_and_another_mix_are_refused(config, two, tmp_path):
    twins = tmp_path / "twins.jsonl"
    twins.write_bytes(Path(two[0]).read_bytes())
    with pytest.raises(EyasError, match=r"twins.jsonl has no conversation that can be used"):
        run(replace(config, data=(two[0], str(twins)), mix=(1, 1)))
    assert not os.path.exists(config.store)
    run(replace(config, data=two, mix=(1, 2)))
    with pytest.raises(EyasError, match=r"another way: mix: \[1\.0, 2\.0\] there, \[2\.0, 1\.0\] here"):
        run(replace(config, data=two, mix=(2, 1)))
    with pytest.raises(ValueError, match=r"^take=\(1, 2, 3\) must be 2 numbers, one for each --data"):
        replace(config, data=two, take=(1, 2, 3))
