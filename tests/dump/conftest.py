"""What a dump begins with, and what a whole one has left."""

import os

import pytest

from common import storage
from dump.config import PrepareConfig
from dump.dump import DumpConfig, run
from tests.dump import tiny
from tests.dump.chats import CHATS, write_model
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


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def prepare_config(chat_model, tmp_path):
    """Of the file of chats, into a store of the test's own."""
    return PrepareConfig((str(CHATS),), chat_model, str(tmp_path / "store"), length=256, holdout=0.2)
