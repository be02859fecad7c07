"""What training takes of the target is in the store, checked, and restored when it is damaged."""

import os
import shutil
from dataclasses import replace

import pytest

from common import storage
from common.errors import EyasError
from common.store import Store
from common.store_verify import verify
from dump.dump import run


def emptied(path):
    storage.write_json(path, {})


def swapped(path):
    """The output head in the place of the embeddings."""
    shutil.copy(f"{os.path.dirname(path)}/lm_head.safetensors", path)


def linked(path):
    os.rename(path, f"{path}.aside")
    storage.write_bytes(f"{path}.other", b"{}")
    os.symlink(f"{path}.other", path)


def cut(path):
    os.truncate(path, os.path.getsize(path) - 1)


@pytest.mark.parametrize("damage", [os.unlink, emptied, linked, cut, swapped])
@pytest.mark.parametrize("name", ["config.json", "embed_tokens.safetensors", "tokenizer.json"])
def test_what_training_takes_of_the_target_is_checked_and_restored(config, dumped, name, damage):
    path = f"{dumped}/target/{name}"
    whole = storage.read_bytes(path)
    damage(path)
    store = Store.open(dumped)
    with pytest.raises(EyasError, match=rf"target/{name} is (missing|damaged)"):
        store.target_file(name)
    if name != "tokenizer.json":
        with pytest.raises(EyasError, match=rf"target/{name} is (missing|damaged)"):
            store.target_config() if name == "config.json" else store.target_tensor("embed_tokens")
    assert any(name in line for line in verify(dumped)["damaged"])
    run(replace(config, store=dumped, block_rows=1))
    assert storage.read_bytes(path) == whole
    assert not os.path.islink(path)
    assert verify(dumped)["damaged"] == []


def test_a_target_is_not_restored_from_another(config, dumped):
    os.unlink(f"{dumped}/target/tokenizer_config.json")
    storage.write_json(f"{config.model}/tokenizer_config.json", {"chat_template": "another"})
    with pytest.raises(EyasError, match=r"the model's tokenizer_config\.json has changed since"):
        run(replace(config, store=dumped, block_rows=1))
