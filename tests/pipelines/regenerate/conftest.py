"""A run to regenerate a small data set, with back-off that tests can wait for."""

import os

import pytest

from pipelines.regenerate import endpoint, work
from pipelines.regenerate.config import RegenerateConfig
from tests.pipelines.regenerate.asking import ask, write_data
from tests.pipelines.regenerate.chat_server import chat_server


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(endpoint, "_FIRST", 0.01)
    monkeypatch.setattr(endpoint, "_LONGEST", 0.05)
    monkeypatch.setattr(endpoint, "_STAGGER", 0.3)
    monkeypatch.setattr(work, "_TICK", 0.02)
    for name in [name for name in os.environ if name.startswith("EYAS_API_KEY")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path):
    data = write_data(tmp_path / "chats.jsonl")
    out = str(tmp_path / "answers.jsonl")
    return RegenerateConfig((data,), out, ("http://127.0.0.1:1",), "tiny", concurrency=4, timeout=5.0)


@pytest.fixture
def expected(config, tmp_path):
    """The bytes of an uninterrupted run without a fault."""
    with chat_server() as server:
        ask(config, server, out=str(tmp_path / "expected.jsonl"))
    return (tmp_path / "expected.jsonl").read_bytes()
