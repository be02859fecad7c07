"""Whatever is changed, cut off or swapped in a store is told in one line."""

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from common import storage, store_verify
from common.errors import DamagedError, EyasError, MachineError
from common.stopping import Stop, Stopped
from common.store import Store
from common.store_verify import verify
from tests.common.made_store import H, R, T, features, make_rows, problem, write_blocks


def flip(path: str, byte: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 4]))


def test_missing_shard_names_array_and_rows(full):
    os.unlink(f"{full}/features/last_hidden/c/1/0/0")
    store = Store.open(full)
    assert store.read(["last_hidden"], [0, 2, 6])
    with pytest.raises(EyasError, match=r"last_hidden rows \[3, 4\]: missing or damaged.*same dump command"):
        store.read(["aux_hidden", "last_hidden"], [1, 2, 3, 4])
    assert "last_hidden" in verify(full)["damaged"][-1]


@pytest.mark.parametrize("byte", [5, T * H * 4 - 1, -10])  # data, its end, the index
def test_flipped_bit_is_refused(full, byte):
    path = f"{full}/features/last_hidden/c/0/0/0"
    flip(path, byte % os.path.getsize(path))
    with pytest.raises(EyasError, match=r"last_hidden rows? \[?0.*damaged on disk .*delete its file"):
        Store.open(full).read(["last_hidden"], [0])


@pytest.mark.parametrize("size", [0, 3, 100, 500])
def test_truncated_shard_is_refused(full, size):
    os.truncate(f"{full}/features/last_hidden/c/1/0/0", size)
    with pytest.raises(EyasError, match="last_hidden rows"):
        Store.open(full).read(["last_hidden"], [3, 4])


def test_damaged_rows_and_index_are_refused(full):
    flip(f"{full}/rows/tokens/c/0/0", 3)
    with pytest.raises(EyasError, match=r"tokens rows \[0\]: damaged on disk"):
        Store.open(full).read(["tokens"], [0])
    flip(f"{full}/index.parquet", 20)
    with pytest.raises(EyasError, match=r"index\.parquet is damaged"):
        Store.open(full).split_rows("train")


def test_whole_shards_of_other_numbers_are_refused(full):
    assert verify(full)["damaged"] == []
    shutil.copy(f"{full}/features/argmax/c/0/0", f"{full}/features/argmax/c/1/0")
    with pytest.raises(EyasError, match=r"argmax rows \[4, 3\]: damaged on disk \(checksums differ\)"):
        Store.open(full).read(["argmax"], [4, 0, 3])
    # Rows have a valid crc32c in the place of others; only the manifest's checksum knows.
    make_rows(f"{full}2", seed=1)
    shutil.copy(f"{full}2/rows/tokens/c/0/0", f"{full}/rows/tokens/c/0/0")
    found = verify(full)["damaged"]
    assert any("tokens rows [0, 1, 2, 3, 4, 5, 6]: damaged on disk" in line for line in found)
    assert any("argmax rows [3, 4, 5]: damaged on disk" in line for line in found)


def test_every_byte_of_every_file_counts(full):
    """One flipped bit, anywhere: all of a small file's bytes, some of a large one's."""
    assert problem(full) == ""
    rng = np.random.default_rng(0)
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    assert len(paths) > 30
    for path in paths:
        whole = storage.read_bytes(path)
        for at in rng.permutation(len(whole))[:5].tolist():
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([whole[at] ^ 1 << int(rng.integers(8))]))
            assert problem(full), (path, at)
        storage.write_bytes(path, whole)
    assert problem(full) == ""


@pytest.mark.slow
def test_no_file_can_be_taken_for_another(full):
    """Each file in the place of each other one, as far as its content differs."""
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    for path in paths:
        whole = storage.read_bytes(path)
        for other in paths[:: len(paths) // 5]:
            if storage.read_bytes(other) != whole:
                shutil.copy(other, path)
                assert problem(full), (path, other)
                storage.write_bytes(path, whole)
        os.unlink(path)
        assert problem(full), path
        os.mkdir(path)
        assert problem(full), path
        os.rmdir(path)
        storage.write_bytes(path, whole)
    assert problem(full) == ""


@pytest.mark.timeout(120)
def test_a_pipe_in_the_place_of_any_file_is_told_and_not_waited_for(full):
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    for path in paths:
        os.rename(path, f"{full}/aside")
        os.mkfifo(path)
        assert "is a pipe or a device" in problem(full), path
        os.replace(f"{full}/aside", path)
    assert problem(full) == ""


def test_a_shard_that_may_not_be_read_is_the_machines_failure_and_no_damage(full):
    store = Store.open(full)
    store.read(["argmax", "tokens"], [3])
    os.chmod(f"{full}/features/argmax/c/1/0", 0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(MachineError, match=r"(?i)permission.denied") as found:
            store.read(["argmax"], [3])
    finally:
        os.seteuid(user)
    assert not isinstance(found.value, DamagedError)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("one", "other"), [("tokens", "positions"), ("tokens", "segment_ids")])
def test_training_refuses_swapped_rows(full, one, other):
    os.rename(f"{full}/rows/{one}", f"{full}/rows/aside")
    os.rename(f"{full}/rows/{other}", f"{full}/rows/{one}")
    os.rename(f"{full}/rows/aside", f"{full}/rows/{other}")
    with pytest.raises(EyasError, match=rf"{one} rows \[3\]: damaged on disk"):
        Store.open(full).read([one], [3])


@pytest.mark.parametrize(
    ("value", "found"), [(-1.0, ""), (-np.inf, "row 4"), (np.nan, "row 4"), (0.5, "row 4"), (-9.0, "row 4")]
)
def test_log_probabilities_that_can_be_none_are_damage(tmp_path, value, found):
    """Though their checksums are right; what is not of a document is not looked at."""
    url = str(tmp_path / "store")
    make_rows(url)
    rows = Store.open(url).read(["segment_ids"], range(R))["segment_ids"]
    values = features() | {
        "topk_logprobs": np.tile(np.float16([-0.5, -1, -8.5]), (R, T, 1)),
        "topk_ids": np.tile(np.int32([4, 2, 3]), (R, T, 1)),
    }
    assert (rows[4] > 0).any()
    values["topk_logprobs"][4, rows[4] > 0, 1] = value
    values["topk_logprobs"][rows <= 0] = np.nan
    write_blocks(url, values, codec={"name": "topk", "size": 3})
    assert found in problem(url)
    assert bool(problem(url)) == bool(found)


def test_a_stop_waits_for_no_part_that_does_not_come(full, monkeypatch):
    """One part is read behind the signal, as others may be; a server never answers for the next."""
    hang, plain = threading.Event(), store_verify._block

    def block(store, name, number):
        if (name, number) == ("last_hidden", 0):
            os.kill(os.getpid(), signal.SIGINT)
            hang.wait(60)
        return plain(store, name, number)

    monkeypatch.setattr(store_verify, "_block", block)
    try:
        start = time.monotonic()
        with Stop(everywhere=True), pytest.raises(Stopped):
            verify(full)
        assert time.monotonic() - start < 10
    finally:
        hang.set()
