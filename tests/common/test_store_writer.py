"""What is written stays: bounded memory, full disks, stops. Of creators at once, none undoes another."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from common import kvstore, stopping, storage, store_writer, zarr
from common.errors import EyasError
from common.store import Store, has_rows
from common.store_writer import FeatureWriter, create_features
from tests.common.made_store import (
    R,
    at_once,
    contents,
    described,
    features,
    make_rows,
    problem,
    write_blocks,
)


def test_bytes_in_flight_are_bounded_and_a_block_always_goes(url, monkeypatch):
    """The disk takes nothing until it is let: `write` goes on while the bytes fit, and then waits."""
    create_features(url, described(features()))
    go, held = threading.Event(), []
    monkeypatch.setattr(FeatureWriter, "_write", lambda *_: go.wait(20))
    blocks = [{n: v[own.start : own.stop] for n, v in features().items()} for own in (range(3), range(3, 6))]
    size = sum(x.nbytes for x in blocks[0].values())
    for limit, passed in ((2 * size, 2), (size, 1), (0, 1)):
        go.clear()
        held.clear()
        writer = FeatureWriter(url, limit)

        def write_all(writer=writer):
            for number in range(4):
                writer.write(number % 2, blocks[number % 2], 0, 0)
                held.append(number)

        thread = threading.Thread(target=write_all)
        thread.start()
        thread.join(0.3)
        assert len(held) == passed
        go.set()
        thread.join(10)
        assert len(held) == 4
        with writer:
            pass


def test_a_stop_does_not_wait_for_a_disk_that_hangs(url, monkeypatch):
    create_features(url, described(features()))
    go = threading.Event()
    monkeypatch.setattr(FeatureWriter, "_write", lambda *_: go.wait(20))
    monkeypatch.setattr(store_writer, "_LAST_SECONDS", 0.2)
    start = time.monotonic()

    def write() -> None:
        with stopping.Stop(everywhere=True), FeatureWriter(url, 0) as writer:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            for _ in range(40):
                writer.write(0, {n: v[:3] for n, v in features().items()}, 0, 0)

    with pytest.raises(stopping.Stopped):
        write()
    assert time.monotonic() - start < 5
    go.set()


def test_a_stop_does_not_wait_for_a_server_that_says_nothing():
    _, answer = ts.Promise.new()

    def read() -> None:
        with stopping.Stop(everywhere=True):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            kvstore.result(answer)

    start = time.monotonic()
    with pytest.raises(stopping.Stopped):
        read()
    assert time.monotonic() - start < 5


def test_bytes_on_disk_are_close_to_raw(tmp_path):
    value = np.random.default_rng(0).standard_normal((16, 128, 4, 32), np.float32)
    made = zarr.open_array(f"{tmp_path}/a", zarr.describe(value.shape, value.dtype, 8), create=True)
    made.write(value).commit.result()
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, found in os.walk(tmp_path) for f in found)
    assert size < 1.002 * value.nbytes


def test_rows_are_never_overwritten(url):
    with pytest.raises(EyasError, match="is a store already"):
        make_rows(url, 7)


def test_the_same_rows_which_somebody_has_just_written_are_left_as_they_are(url):
    files = [path for path in Path(url).rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    make_rows(url)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_other_features_are_refused_by_field(full):
    other = described(features()) | {"block_rows": 5, "codec": {"name": "topk", "k": 64}}
    before = storage.read_bytes(f"{full}/manifest.json")
    with pytest.raises(
        EyasError, match=r"block_rows: 3 there, 5 here; codec\.k: null there, 64 here"
    ) as found:
        create_features(full, other)
    assert "\n" not in str(found.value)
    assert storage.read_bytes(f"{full}/manifest.json") == before


def test_a_disk_that_is_full_when_the_arrays_are_made_is_one_line(tmp_path, url):
    place = f"{tmp_path}/other"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        with pytest.raises(EyasError, match=r"other/.*: the disk is full; make room") as rows_error:
            make_rows(place)
        with pytest.raises(EyasError, match=r"store/.*: the disk is full; make room") as features_error:
            write_blocks(url, features())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in f"{rows_error.value}{features_error.value}"
    assert "features" not in Store.open(url).manifest
    make_rows(place)
    assert contents(place) == contents(url)


def test_full_disk_is_one_line_and_resumable(url):
    """A limit on the size of a file stands in for a full disk: TensorStore sees a failing write."""
    script = (
        "import resource, sys; sys.path.insert(0, '.');"
        "from tests.common import made_store as t;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY));"
        f"t.write_blocks({url!r}, t.features())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "MachineError" in last
    assert "the disk is full; make room and run the same command again" in last
    assert 0 not in Store.open(url).committed()
    write_blocks(url, features())
    Store.open(url).require_complete()
    np.testing.assert_array_equal(
        Store.open(url).read(["aux_hidden"], range(R))["aux_hidden"], features()["aux_hidden"]
    )


def test_of_two_prepares_at_once_one_wins(tmp_path):
    url, found = f"{tmp_path}/store", {}
    gate = threading.Barrier(4)

    def prepare(seed: int) -> None:
        gate.wait()
        try:
            make_rows(url, seed)
            found[seed] = None
        except EyasError as error:
            found[seed] = str(error)

    at_once(prepare)
    (winner,) = [seed for seed, error in found.items() if error is None]
    assert all("is a store already" in e or "the beginning of other rows" in e for e in found.values() if e)
    assert problem(url) == ""
    make_rows(f"{tmp_path}/alone", winner)
    assert contents(url) == contents(f"{tmp_path}/alone")


def test_an_interrupted_prepare_is_no_store_and_is_continued(tmp_path, monkeypatch):
    url = f"{tmp_path}/store"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            make_rows(url)
    assert not has_rows(url)
    for use in (Store.open, lambda url: write_blocks(url, features())):
        with pytest.raises(EyasError, match="prepare was stopped; run the same command again"):
            use(url)
    before = contents(url)
    with pytest.raises(EyasError, match=r"the beginning of other rows: .*files"):
        make_rows(url, seed=1)
    assert contents(url) == before
    make_rows(url)
    assert has_rows(url)
    assert problem(url) == ""


def test_of_two_dumps_at_once_one_wins_and_the_same_continue(tmp_path, monkeypatch):
    """All have seen a store without features when they begin to make them."""
    url, values, found = f"{tmp_path}/store", features(), {}
    make_rows(url)
    gate, waited = threading.Barrier(4), threading.local()
    find = store_writer.find_features

    def together(*arguments):
        result = find(*arguments)
        if not hasattr(waited, "once"):
            waited.once = gate.wait()
        return result

    monkeypatch.setattr(store_writer, "find_features", together)

    def dump(number: int) -> None:
        wanted = described(values) | {"compute_dtype": "bfloat16" if number % 2 else "float32"}
        try:
            store_writer.create_features(url, wanted)
            found[number] = wanted["compute_dtype"]
        except EyasError as error:
            found[number] = str(error)

    at_once(dump)
    kept = Store.open(url).features["compute_dtype"]
    for number, result in found.items():
        mine = "bfloat16" if number % 2 else "float32"
        assert result == kept if mine == kept else "was dumped otherwise: compute_dtype" in result


def test_who_comes_between_the_look_and_the_claim_is_not_replaced(tmp_path, monkeypatch):
    url, values = f"{tmp_path}/store", features()
    make_rows(url)
    find, others = store_writer.find_features, described(values) | {"compute_dtype": "bfloat16"}

    def look(*arguments):
        result = find(*arguments)
        monkeypatch.setattr(store_writer, "find_features", find)
        store_writer.create_features(url, others)
        return result

    monkeypatch.setattr(store_writer, "find_features", look)
    with pytest.raises(EyasError, match="was dumped otherwise: compute_dtype"):
        store_writer.create_features(url, described(values) | {"compute_dtype": "float32"})
    assert Store.open(url).features["compute_dtype"] == "bfloat16"


def test_committed_blocks_are_never_written_again(full):
    before = contents(f"{full}/features") | contents(f"{full}/commits")
    others = {name: value[::-1] for name, value in features().items()}
    write_blocks(full, others)
    assert contents(f"{full}/features") | contents(f"{full}/commits") == before
    assert problem(full) == ""


def test_a_block_that_two_dumps_write_differently_is_told(tmp_path, monkeypatch):
    """The other dump commits between our look and our own marker."""
    url = f"{tmp_path}/store"
    make_rows(url)
    write_blocks(url, features(), [0])
    theirs = storage.read_bytes(f"{url}/commits/000000.json")
    os.unlink(f"{url}/commits/000000.json")
    create = kvstore.create_file

    def later(place, data):
        create(place, theirs)
        return create(place, data)

    monkeypatch.setattr(kvstore, "create_file", later)
    write_blocks(url, features(), [0])  # the same numbers: committed, by whomever
    os.unlink(f"{url}/commits/000000.json")
    others = {name: value[::-1] for name, value in features().items()}
    with pytest.raises(EyasError, match="by another dump at the same time, with other numbers"):
        write_blocks(url, others, [0])
    assert storage.read_bytes(f"{url}/commits/000000.json") == theirs


def test_files_are_created_and_replaced_on_condition_only(tmp_path):
    place = f"{tmp_path}/folder/a.json"
    assert not kvstore.replace_file(place, b"old", b"new")
    assert kvstore.create_file(place, b"old")
    assert not kvstore.create_file(place, b"other")
    assert not kvstore.replace_file(place, b"other", b"new")
    assert storage.read_bytes(place) == b"old"
    assert kvstore.replace_file(place, b"old", b"new")
    assert storage.read_bytes(place) == b"new"
    assert os.listdir(f"{tmp_path}/folder") == ["a.json"]
