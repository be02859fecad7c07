"""Stores that the tests of reading, writing and damage begin with."""

import pytest

from tests.common.made_store import features, make_rows, write_blocks


@pytest.fixture
def url(tmp_path) -> str:
    make_rows(f"{tmp_path}/store")
    return f"{tmp_path}/store"


@pytest.fixture
def full(url) -> str:
    write_blocks(url, features())
    return url
