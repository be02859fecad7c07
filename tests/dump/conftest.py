"""What a dump begins with, and what a whole one has left."""

import os

import pytest

from common import storage
from dump.dump import DumpConfig, run
from tests.dump import tiny
from tests.dump.tiny import ROWS, contents


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = tiny.write_model(f"{folder}/model")
    return model, tiny.write_store(f"{folder}/store", model, ROWS)


@pytest.fixture(scope="session")
def whole(made, tmp_path_factory):
    """Every file of an uninterrupted dump in blocks of one row."""
    model, rows = made
    store = f"{tmp_path_factory.mktemp('whole')}/store"
    os.system(f"cp -r {rows} {store}")
    run(DumpConfig(model, store, logits="topk", topk=4, block_rows=1))
    return contents(store)


@pytest.fixture
def config(tmp_path, made):
    """A model folder and a store of rows of the test's own."""
    for folder, place in zip(made, ("model", "store"), strict=True):
        os.system(f"cp -r {folder} {tmp_path}/{place}")
    return DumpConfig(f"{tmp_path}/model", f"{tmp_path}/store", logits="topk", topk=4, block_rows=4)


@pytest.fixture
def dumped(config, whole, tmp_path):
    """A complete store, copied."""
    for name, data in whole.items():
        storage.write_bytes(f"{tmp_path}/dumped/{name}", data)
    return f"{tmp_path}/dumped"
