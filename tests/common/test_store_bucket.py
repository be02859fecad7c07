"""The store in a bucket: what is written comes back, and of several creators one wins, as in a folder."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from common import kvstore, storage, zarr
from common.errors import EyasError
from common.store import Store, has_rows
from common.store_verify import verify
from tests.common.bucket import Bucket, serving
from tests.common.made_store import features, make_rows, write_blocks
from tests.common.refusing import environment

URL = "gs://bucket/store"


def at_once(task, count: int = 4) -> list[str]:
    """The text of every failure of `task(number)`, one thread each; "" where it succeeds."""
    gate, found = threading.Barrier(count), [""] * count

    def run(number: int) -> None:
        gate.wait()
        try:
            task(number)
        except EyasError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def files_on_condition() -> None:
    place = f"{URL}/a.json"
    assert not kvstore.replace_file(place, b"old", b"new")
    made = at_once(lambda number: storage_error(kvstore.create_file(place, b"%d" % number)))
    assert sorted(map(bool, made)) == [False, True, True, True]
    old = storage.read_bytes(place)
    assert old == b"%d" % made.index("")
    assert not kvstore.replace_file(place, b"other", b"new")
    assert kvstore.replace_file(place, old, b"new")
    assert storage.read_bytes(place) == b"new"


def both_clients_name_objects_alike() -> None:
    """Arrays and conditional files go through TensorStore, other files through gcsfs."""
    odd = ("", "/", "/a", "//a", "/a//b", "/a/../b", "/a b", "/a%20b", "/a#b?c=d", "/a*[b]", "/ü", "/a|b:c@d")
    for scheme, prefixes in (("gs", odd), ("gcs", ("", "/a"))):
        for number, prefix in enumerate(prefixes):
            url, data = f"{scheme}://bucket{prefix}", f"{scheme}{number}".encode()
            place = f"{url.rstrip('/')}/x{number}{scheme}"
            assert kvstore.create_file(place, data)
            assert storage.read_bytes(place) == data
            assert f"x{number}{scheme}" in storage.list_names(url)
            storage.write_bytes(place, b"new")
            assert kvstore.replace_file(place, b"new", b"newer")
            zarr.open_array(f"{url}/y", zarr.describe((3,), np.dtype(np.int32)), create=True)
            assert storage.exists(f"{url.rstrip('/')}/y/zarr.json")


def others_are_seen() -> None:
    """What was listed once is not remembered: another process may have written or deleted since."""
    storage.write_bytes(f"{URL}/commits/000000.json", b"{}")
    assert storage.list_names(f"{URL}/commits") == ["000000.json"]
    assert kvstore.create_file(f"{URL}/commits/000001.json", b"{}")  # not through the same library
    assert storage.exists(f"{URL}/commits/000001.json")
    assert storage.list_names(f"{URL}/commits") == ["000000.json", "000001.json"]


def few_requests() -> None:
    """An object is written in one request; rows side by side are read in one, and the index only once."""
    with serving(bucket := Bucket()) as port:
        os.environ.update(environment(port))
        zarr.CHUNK_BYTES, zarr.SHARD_BYTES, zarr.GATHERED_BYTES = 6400, 204_800, 0
        value = np.random.default_rng(0).standard_normal((32, 64, 100), np.float32)
        described = zarr.describe(value.shape, value.dtype, 16)
        assert (described["chunk"], described["shard"]) == ([1, 16, 100], [8, 64, 100])
        array = zarr.open_array("gs://bucket/a", described, create=True)

        def requests(task) -> list[str]:
            bucket.requests.clear()
            task()
            return sorted(request.rpartition("/c/")[0][:4] for request in bucket.requests)

        assert requests(lambda: array[:16].write(value[:16]).commit.result()) == ["POST"] * 2
        array[16:].write(value[16:]).commit.result()
        array = zarr.open_array("gs://bucket/a", described, indices=True)
        read = lambda rows: zarr.read_rows({"a": array}, np.array(rows))["a"]  # noqa: E731
        assert requests(lambda: read([3])) == ["GET "] * 2  # its index, and four chunks
        assert requests(lambda: read([4, 5, 6])) == ["GET "]
        assert requests(lambda: read([0, 3, 6])) == ["GET "] * 3
        assert requests(lambda: read(range(32))) == ["GET "] * 4
        np.testing.assert_array_equal(read([31, 3]), value[[31, 3]])


def damaged_on_the_way() -> None:
    """Bytes that come damaged are fetched once more; what is stored damaged stays an error."""
    make_rows(URL)
    write_blocks(URL, features())
    store = Store.open(URL)
    numbers, files = zarr.read_rows, storage.read_bytes
    damaged: set[str] = set()

    def damaged_once(arrays, rows):
        found = numbers(arrays, rows)
        for name in found.keys() - damaged:
            damaged.add(name)
            found[name].reshape(-1).view(np.uint8)[3] ^= 1
        return found

    def cut_once(url, *arguments):
        data = files(url, *arguments)
        if url in damaged:
            return data
        damaged.add(url)
        return data[: len(data) // 2]

    zarr.read_rows, storage.read_bytes = damaged_once, cut_once
    np.testing.assert_array_equal(store.read(["argmax"], [5, 1])["argmax"], features()["argmax"][[5, 1]])
    np.testing.assert_array_equal(store.token_counts(), np.arange(50))
    assert store.split_rows("test").tolist() == [6]
    assert store.target_config() == {"hidden_size": 8}
    assert damaged >= {"argmax", "token_counts", f"{URL}/index.parquet", f"{URL}/commits/000001.json"}
    zarr.read_rows, storage.read_bytes = numbers, files
    place = f"{URL}/features/argmax/c/0/0"
    data = bytearray(storage.read_bytes(place))
    data[5] ^= 1
    storage.write_bytes(place, bytes(data))
    assert [f"argmax rows {[0]}" in line for line in verify(URL)["damaged"]] == [True]


def storage_error(written: bool) -> None:
    if not written:
        raise EyasError("there is one")


def prepares_at_once() -> None:
    """Each prepares other rows, so that only one can win."""
    found = at_once(lambda seed: make_rows(URL, seed))
    assert found.count("") == 1
    assert all("is a store already" in text or "beginning of other rows" in text for text in found if text)
    assert has_rows(URL)
    assert verify(URL)["damaged"] == []


def dumps_at_once() -> None:
    """All write the same blocks, as two starts of the same command do."""
    make_rows(URL)
    assert at_once(lambda _: write_blocks(URL, features())) == [""] * 4
    before = storage.read_bytes(f"{URL}/commits/000001.json")
    write_blocks(URL, {name: value[::-1] for name, value in features().items()})
    assert storage.read_bytes(f"{URL}/commits/000001.json") == before
    assert verify(URL)["damaged"] == []
    assert verify(URL)["missing_blocks"] == 0
    found = Store.open(URL).read(list(features()), [6, 0, 5])
    for name, value in features().items():
        np.testing.assert_array_equal(found[name], value[[6, 0, 5]])


@pytest.mark.parametrize(
    "what",
    [
        files_on_condition,
        both_clients_name_objects_alike,
        others_are_seen,
        few_requests,
        damaged_on_the_way,
        prepares_at_once,
        dumps_at_once,
    ],
)
def test_in_a_bucket(what):
    with serving(Bucket()) as port:
        done = subprocess.run(
            [sys.executable, "-m", "tests.common.test_store_bucket", what.__name__],
            env=os.environ | environment(port),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    globals()[sys.argv[1]]()
