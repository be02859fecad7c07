"""A cache of rows: never over its size, never trusted; no death and no damage is seen in what is read."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import zarr
from common.errors import EyasError
from common.row_cache import RowCache, parse
from common.store import Store
from tests.train import small_store

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/mnt/ssd:200GB", ("/mnt/ssd", 200_000_000_000)),
        ("a:b:1.5 tb", ("a:b", 1_500_000_000_000)),
        ("x:10", ("x", 10)),
        ("x:3k", ("x", 3000)),
    ],
)
def test_folder_and_size(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["/mnt/ssd", "/mnt/ssd:", ":5GB", "x:5 parsecs", "x:-1", "x:0", "gs://b/x:5GB", f"x:{'9' * 400}T"]
)
def test_what_is_no_folder_and_size_is_refused(text):
    with pytest.raises(EyasError, match=r"^cache='.*must be"):
        parse(text)


def size_of(folder):
    """The bytes of entries, those that are being written included."""
    paths = (Path(where, name) for where, _, names in os.walk(folder) for name in names)
    total = 0
    for path in paths:
        if path.name != ".used":
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_the_longest_unread_go_first_and_the_size_holds(tmp_path):
    cache = RowCache(str(tmp_path), 1000)
    (tmp_path / "mine.txt").write_text("x" * 5000)  # somebody's, and no entry
    for number in range(9):
        cache.write(f"s/{number}", bytes(100))
        os.utime(tmp_path / "eyas-cache" / "s" / str(number), (number, number))
    assert cache.read("s/0") == bytes(100)  # which makes it the newest
    cache.write("s/new", bytes(300))
    assert size_of(tmp_path / "eyas-cache") <= 1000
    left = sorted(os.listdir(tmp_path / "eyas-cache" / "s"))
    assert {"0", "new", "8"} <= set(left)
    assert not {"1", "2"} & set(left)
    cache.write("s/large", bytes(1001))
    assert cache.read("s/large") is None
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("damage", [b"", b"-5", b"x" * 100, b"99999999", b"00"])
def test_a_damaged_count_is_counted_anew(tmp_path, damage):
    RowCache(str(tmp_path), 1000).write("s/a", bytes(400))
    (tmp_path / "eyas-cache" / ".used").write_bytes(damage)
    cache = RowCache(str(tmp_path), 1000)
    for number in range(5):
        cache.write(f"s/{number}", bytes(400))
        assert size_of(tmp_path / "eyas-cache") <= 1000
    assert cache.read("s/4") == bytes(400)


def test_what_cannot_be_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(EyasError, match="is a file"):
        RowCache(str(tmp_path / "file"), 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000))
    with pytest.raises(EyasError, match=r"entries of the cache need 5.00kB, .* give it a smaller"):
        RowCache(str(tmp_path), 5_000)


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch, capsys):
    cache = RowCache(str(tmp_path), 1000)
    cache.write("s/a", b"a")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.write("s/b", b"b")
    cache.write("s/c", b"c")
    assert capsys.readouterr().err.count("keeps no more: No space left on device") == 1
    assert (cache.read("s/a"), cache.read("s/b")) == (b"a", None)
    assert size_of(tmp_path) == 1


def test_who_empties_the_folder_meanwhile_does_not_end_the_keeping(tmp_path, monkeypatch, capsys):
    cache, replace = RowCache(str(tmp_path), 1000), os.replace

    def emptied(*paths):
        shutil.rmtree(tmp_path / "eyas-cache")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", emptied)
        cache.write("s/a", b"a")
    cache.write("s/b", b"b")
    assert (cache.read("s/a"), cache.read("s/b")) == (None, b"b")
    assert not capsys.readouterr().err


WRITER = """
import sys, random
from common.row_cache import RowCache
cache, seed = RowCache(sys.argv[1], 20_000), random.Random(int(sys.argv[2]))
while True:
    number = seed.randrange(400)
    expected = bytes([number % 251]) * (10 + number)
    found = cache.read(f"s/{number % 7}/{number}")
    assert found in (None, expected), number
    if found is None:
        cache.write(f"s/{number % 7}/{number}", expected)
        print("written", flush=True)
"""


def test_processes_that_are_killed_leave_whole_entries_within_the_size(tmp_path):
    chance, processes = random.Random(3), []

    def start():
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(chance.randrange(10**6))]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))

    def kill(process):
        for _ in range(chance.randrange(20, 80)):
            assert process.stdout.readline(), process.stderr.read().decode()
            with cache._counted():  # nobody begins a new one
                assert size_of(tmp_path) <= 20_000
        process.kill()
        _, said = process.communicate()
        assert said == b"", said.decode()

    cache = RowCache(str(tmp_path), 20_000)
    for _ in range(3):
        start()
    for _ in range(6):
        kill(processes.pop(0))
        start()
    for process in processes:
        kill(process)
    assert size_of(tmp_path) > 10_000, "it is in use"
    for number in range(400):
        assert cache.read(f"s/{number % 7}/{number}") in (None, bytes([number % 251]) * (10 + number))


@pytest.fixture(scope="module", params=["float32", "float8_e4m3fn"])
def url(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("kept") / "store"
    return small_store.write_store(str(place), "draft", request.param)


NAMES = ("tokens", "loss_mask", "aux_hidden", "last_hidden", "argmax", "draft_logprobs")
ROWS = np.array([9, 0, 1, 9, 14])


@pytest.fixture
def asked(monkeypatch):
    """The rows that are asked of the arrays themselves, by name."""
    found, read_each = {}, zarr.read_each

    def counted(wanted):
        for name, (_, rows) in wanted.items():
            found.setdefault(name, []).extend(rows.tolist())
        return read_each(wanted)

    monkeypatch.setattr(zarr, "read_each", counted)
    return found


def same(found, expected):
    for name, values in expected.items():
        assert values.dtype == found[name].dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), values.view(np.uint8), err_msg=name)


def test_rows_come_from_the_cache_as_from_the_store_and_once(url, tmp_path, asked):
    expected = Store.open(url).read(NAMES, ROWS)
    embed = Store.open(url).target_tensor("embed_tokens")
    asked.clear()
    for _ in range(2):
        store = Store.open(url, RowCache(str(tmp_path), 10**8))
        same(store.read(NAMES, ROWS), expected)
        np.testing.assert_array_equal(store.target_tensor("embed_tokens"), embed)
    for name, rows in asked.items():
        assert len(rows) == len(set(rows)), f"{name}: {rows}"


def test_a_damaged_entry_is_read_anew(tmp_path, asked):
    url = small_store.write_store(str(tmp_path / "store"))
    expected = Store.open(url).read(NAMES[:5], ROWS)
    place = tmp_path / "cache"
    store = Store.open(url, RowCache(str(place), 10**8))
    same(store.read(NAMES[:5], ROWS), expected)
    embed = store.target_tensor("embed_tokens")
    paths = [Path(where, name) for where, _, names in os.walk(place) for name in names if name != ".used"]
    for path in paths:
        data = path.read_bytes()
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        for damaged in (b"", data[:half], data + b"x", flipped):
            path.write_bytes(damaged)
            store = Store.open(url, RowCache(str(place), 10**8))
            same(store.read(NAMES[:5], ROWS), expected)
            np.testing.assert_array_equal(store.target_tensor("embed_tokens"), embed)
            assert path.read_bytes() == data, "it is mended"
    asked.clear()
    same(store.read(NAMES[:5], ROWS), expected)
    assert not asked


def test_what_is_damaged_in_the_store_is_refused_and_not_kept(tmp_path):
    url = small_store.write_store(str(tmp_path / "store"))
    shard = next(p for p in (Path(url) / "features/last_hidden/c/0").rglob("*") if p.is_file())
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = Store.open(url, RowCache(str(tmp_path / "cache"), 10**8))
    for _ in range(2):
        with pytest.raises(EyasError, match=r"last_hidden rows \[0\]: damaged on disk"):
            store.read(("last_hidden",), [0, 1])


def test_a_cache_that_cannot_be_counted_any_more_ends_no_run(tmp_path, capsys):
    """Its disk turns read-only, say."""
    cache = RowCache(str(tmp_path), 1000)
    cache.write("a", b"x" * 10)
    (tmp_path / "eyas-cache/.used").unlink()
    (tmp_path / "eyas-cache/.used").mkdir()
    cache.write("b", b"x" * 10)
    assert "keeps no more" in capsys.readouterr().err
    assert cache.read("a") == b"x" * 10


# What is put in the place of every entry, in turn.
ANYTHING = {
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a file": lambda path: path.symlink_to(__file__),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a terabyte of nothing": lambda path: [path.write_bytes(b""), os.truncate(path, 10**12)],
}


@pytest.mark.parametrize("name", ANYTHING)
def test_anything_in_the_place_of_an_entry_is_read_anew(tmp_path, name):
    """Also while the cache is in use; no link is followed."""
    url = small_store.write_store(str(tmp_path / "store"))
    expected = Store.open(url).read(NAMES[:5], ROWS)
    store = Store.open(url, RowCache(str(tmp_path), 10**8))
    for _ in range(2):
        same(store.read(NAMES[:5], ROWS), expected)
        embed = store.target_tensor("embed_tokens")
        for folder, _, names in os.walk(tmp_path / "eyas-cache"):
            for entry in (Path(folder, one) for one in names if one != ".used"):
                entry.unlink()
                ANYTHING[name](entry)
    same(store.read(NAMES[:5], ROWS), expected)
    again = Store.open(url, RowCache(str(tmp_path), 10**8))
    np.testing.assert_array_equal(again.target_tensor("embed_tokens"), embed)
