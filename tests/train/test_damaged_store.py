"""Training takes nothing from a store that is not what the dump wrote."""

import os
import shutil

import numpy as np
import pytest

from common import storage
from common.errors import EyasError
from common.store import Store
from tests.train import small_store
from train.config import TrainConfig
from train.run import run


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_store.write_store(f"{tmp_path_factory.mktemp('sound')}/store", codec="draft")


def swap(store, one, other):
    for path, place in ((one, "aside"), (other, one), ("aside", other)):
        os.rename(f"{store}/{path}", f"{store}/{place}")


def ids_of_others(store):
    """The draft ids of another store, in a shard that is whole."""
    other = small_store.write_store(f"{store}.other", codec="draft", rows=12)
    assert not np.array_equal(Store.open(other).draft_ids(), Store.open(store).draft_ids())
    shutil.copy(f"{other}/features/draft_ids/c/0", f"{store}/features/draft_ids/c/0")


DAMAGE = {
    "tokens and positions swapped": lambda s: swap(s, "rows/tokens", "rows/positions"),
    "segments and positions swapped": lambda s: swap(s, "rows/segment_ids", "rows/positions"),
    "embeddings as output head": lambda s: shutil.copy(
        f"{s}/target/embed_tokens.safetensors", f"{s}/target/lm_head.safetensors"
    ),
    "an emptied config": lambda s: storage.write_json(f"{s}/target/config.json", {}),
    "another's config": lambda s: storage.write_json(
        f"{s}/target/config.json", small_store.TARGET | {"rope_theta": 5000.0}
    ),
    "another's draft ids": ids_of_others,
    "states of other rows": lambda s: shutil.copy(
        f"{s}/features/aux_hidden/c/0/0/0/0", f"{s}/features/aux_hidden/c/1/0/0/0"
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_refused_in_one_line(sound, tmp_path, name):
    store = f"{tmp_path}/store"
    shutil.copytree(sound, store)
    DAMAGE[name](store)
    config = TrainConfig(store=store, out=f"{tmp_path}/out", steps=2, teacher="stored")
    with pytest.raises(EyasError, match="damaged") as found:
        run(config)
    assert "\n" not in str(found.value)
