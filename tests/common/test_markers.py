"""A commit marker is whole and its block's, or one line says what is wrong with it."""

import math
import os

import pytest

from common import storage
from common.errors import EyasError
from common.store import Store
from tests.common.made_store import BLOCK, edit, problem, require_named


def of_marker(**change):
    return lambda marker: marker.update(change)


MARKERS = {
    "another key": lambda m: m.update(sums=m.pop("crc32c")),
    "another store": of_marker(store="b" * 64),
    "no text": of_marker(store=5),
    "another number": of_marker(block=0),
    "no number": of_marker(block=True),
    "others' rows": of_marker(rows=[0, 3]),
    "no rows": of_marker(rows=None),
    "other counts": of_marker(tokens=11),
    "sums of no array": lambda m: m["crc32c"].update(other=[1, 2, 3]),
    "no sums of an array": lambda m: m["crc32c"].pop("argmax"),
    "too few sums": lambda m: m["crc32c"]["argmax"].pop(),
    "sums of text": lambda m: m["crc32c"].update(argmax=["1", "2", "3"]),
    "sums of other numbers": lambda m: m["crc32c"].update(argmax=[1, 2, 3]),
    "negative sums": lambda m: m["crc32c"].update(argmax=[-1, 2, 3]),
    "a list of sums": of_marker(crc32c=[1, 2, 3]),
    "a number that is none": of_marker(more=math.nan),
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_is_whole_and_its_blocks(full, name):
    edit(f"{full}/commits/000001.json", MARKERS[name])
    require_named(
        "commits/000001.json",
        lambda: Store.open(full).read(["argmax"], [4]),
        lambda: Store.open(full).commits(),
    )
    assert "000001.json" in problem(full)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"', "", "[" * 100_000, '{"block": 1'])
def test_a_marker_that_is_anything_else(full, text):
    with open(f"{full}/commits/000001.json", "w") as file:
        file.write(text)
    with pytest.raises(EyasError, match=r"commits/000001\.json"):
        Store.open(full).commits()


def test_a_marker_that_is_a_folder_or_of_no_block(full):
    os.rename(f"{full}/commits/000001.json", f"{full}/commits/000003.json")
    assert "commits/000003.json is no block's" in problem(full)
    os.mkdir(f"{full}/commits/000001.json")
    with pytest.raises(EyasError, match=r"000001\.json is a folder"):
        Store.open(full).commits()
    with pytest.raises(EyasError, match=r"000001\.json is a folder"):
        Store.open(full).read(["argmax"], [4])


def test_a_million_blocks_are_seen(full):
    store = Store.open(full)
    store.rows = BLOCK * 2_000_000
    for name in ("1234567.json", "0000001.json", "2000000.json", "12345678901234567890.json"):
        storage.write_bytes(f"{full}/commits/{name}", b"{}")
    assert store.committed() == {0, 1, 2, 1_234_567}
    assert store.marker_place(1_234_567) == f"{full}/commits/1234567.json"


def test_a_marker_without_checksums_is_refused(full):
    edit(f"{full}/commits/000001.json", lambda m: m.pop("crc32c"))
    with pytest.raises(EyasError, match=r"000001\.json has no crc32c; delete it"):
        Store.open(full).read(["argmax"], [4])
