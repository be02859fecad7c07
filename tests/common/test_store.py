"""The store gives back what was written, or an error of one line; never a number that was not written."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import tensorstore as ts

from common import kvstore, safetensors, stopping, storage, store_writer, zarr
from common.checked import sha256
from common.errors import EyasError
from common.store import Store, tensor_file
from common.store_verify import verify
from common.store_writer import FeatureWriter, create_features, describe_arrays, write_rows

R, T, A, H, V, BLOCK = 7, 12, 3, 8, 50, 3  # the last block has one row
TARGET = {
    "config.json": b'{"hidden_size": 8}',
    tensor_file("embed_tokens"): safetensors.to_bytes({"embed_tokens": np.ones((V, H), np.float32)}),
    tensor_file("lm_head"): safetensors.to_bytes({"lm_head": np.zeros((V, H), np.float32)}),
}
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn}


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    whole = {n: rng.integers(0, V, (R, T), np.int32) for n in ("tokens", "segment_ids", "positions")}
    return whole | {"loss_mask": rng.integers(0, 2, (R, T), np.uint8)}


def features(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    values = {
        "aux_hidden": rng.standard_normal((R, T, A, H)).astype(dtype),
        "last_hidden": rng.standard_normal((R, T, H)).astype(dtype),
        "argmax": rng.integers(0, V, (R, T), np.int32),
    }
    values["last_hidden"][0] = 0  # zeros are stored too, not left out
    return values


def described(values: dict[str, np.ndarray]) -> dict:
    return {
        "target": {"name": "tiny", "architecture": "LlamaForCausalLM", "config_hash": "a" * 64}
        | {"hidden_size": H, "vocab_size": V, "layers": 8},
        "aux_layers": [2, 4, 5],
        "codec": {"name": "none", "size": 0},
        "precision": values["last_hidden"].dtype.name,
        "block_rows": BLOCK,
        "arrays": describe_arrays({n: (v.shape, v.dtype) for n, v in values.items()}, BLOCK),
        "target_files": {name: sha256(data) for name, data in TARGET.items()},
    }


def make_rows(url, seed: int = 0) -> None:
    index = {"id": ["a", "b", "c"], "split": ["train", "train", "test"], "row": [0, 4, 6]}
    index = pa.table(index | {"length": [T, T, 5]})
    write_rows(
        url, rows(seed), np.arange(V, dtype=np.int64), index, {"rows": R, "length": T, "vocab_size": V}
    )


def write_blocks(url, values, blocks=None) -> None:
    create_features(url, described(values))
    with FeatureWriter(url) as writer:
        for name, data in TARGET.items():
            storage.write_bytes(f"{url}/target/{name}", data)
        for block in blocks or range(writer.store.blocks):
            own = writer.store.block_range(block)
            writer.write(block, {n: v[own.start : own.stop] for n, v in values.items()}, 10, 5)


@pytest.fixture
def url(tmp_path) -> str:
    make_rows(f"{tmp_path}/store")
    return f"{tmp_path}/store"


@pytest.fixture
def full(url) -> str:
    write_blocks(url, features())
    return url


def edit(path: str, change) -> None:
    value = storage.read_json(path)
    change(value)
    storage.write_json(path, value)


def flip(path: str, byte: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 4]))


@pytest.mark.parametrize("kind", DTYPES)
def test_round_trip_in_any_order(url, kind):
    values = features(DTYPES[kind])
    write_blocks(url, values)
    store = Store.open(url)
    store.require_complete()
    wanted = [6, 0, 1, 2, 5, 5, 3]
    found = store.read([*values, "tokens", "loss_mask"], wanted)
    for name, value in (values | rows()).items():
        if name in found:
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name].view(np.uint8), value[wanted].view(np.uint8), name)
    np.testing.assert_array_equal(store.token_counts(), np.arange(V))
    assert store.split_rows("train").tolist() == [0, 4]
    assert store.split_rows("test").tolist() == [6]
    assert store.read(["aux_hidden"], [])["aux_hidden"].shape == (0, T, A, H)


def test_chunks_are_of_a_size_to_read_and_shards_of_a_size_to_write():
    """Of Qwen3-32B at 32 rows a block the aux states are 2 GB: too much for one request to a bucket."""
    bf16, int32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.int32)
    aux, T = (3, 5120), 2048
    assert zarr.layout((900, T, *aux), bf16, 32) == ((4, T, *aux), (1, 256, *aux))
    assert 64e6 < 4 * T * 3 * 5120 * 2 <= zarr.SHARD_BYTES
    assert zarr.layout((900, T, 5120), bf16, 32) == ((8, T, 5120), (1, 512, 5120))
    assert zarr.layout((900, T, *aux), bf16, 7) == ((1, T, *aux), (1, 256, *aux))
    # A row of a whole vocabulary is 622 MB: parts of whole chunks.
    assert zarr.layout((9, T, 151_936), bf16, 32) == ((1, 512, 151_936), (1, 32, 151_936))
    # Small rows are read some at a time, whatever their number.
    assert zarr.layout((900, T), int32, 32) == ((32, T), (8, T))
    assert zarr.layout((100_000, T), int32) == ((8192, T), (8, T))
    assert zarr.layout((5_003, T), int32) == ((5_008, T), (8, T))
    assert zarr.layout((7, 12), int32) == ((7, 12), (7, 12))
    assert zarr.layout((151_936,), int32) == ((151_936,), (151_936,))


@pytest.mark.parametrize(("limit", "shard"), [(T * A * H * 4, [1, T, A, H]), (500, [1, 4, A, H])])
def test_blocks_of_many_shards_and_rows_of_many_chunks_round_trip(url, monkeypatch, limit, shard):
    monkeypatch.setattr(zarr, "CHUNK_BYTES", 200)
    monkeypatch.setattr(zarr, "SHARD_BYTES", limit)
    values = features()
    write_blocks(url, values)
    array = Store.open(url).features["arrays"]["aux_hidden"]
    assert (array["chunk"], array["shard"]) == ([1, 2, A, H], shard)
    found = Store.open(url).read(["aux_hidden"], [3, 1])["aux_hidden"]
    np.testing.assert_array_equal(found, values["aux_hidden"][[3, 1]])
    assert verify(url)["damaged"] == []
    assert len(os.listdir(f"{url}/features/aux_hidden/c")) == R


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


def test_no_store_and_no_features(tmp_path, url):
    with pytest.raises(EyasError, match="is no feature store"):
        Store.open(f"{tmp_path}/nothing")
    store = Store.open(url)
    with pytest.raises(EyasError, match="no features yet; run dump"):
        store.require_complete()
    with pytest.raises(EyasError, match="no features yet; run dump"):
        store.read(["aux_hidden"], [0])


def test_cut_and_edited_manifests(full):
    place = f"{full}/manifest.json"
    text = storage.read_bytes(place)
    edit(place, lambda m: m["features"]["target"].update(name="other"))
    with pytest.raises(EyasError, match="written under another manifest"):
        Store.open(full).require_complete()
    storage.write_bytes(place, text)
    edit(place, lambda m: m["rows"]["arrays"]["tokens"].update(dtype="int64"))
    with pytest.raises(EyasError, match=r"tokens is .*int64.*ask for .*int32"):
        Store.open(full)
    storage.write_bytes(place, text[:200])
    with pytest.raises(EyasError, match="is not JSON"):
        Store.open(full)
    for broken in ("[]", '{"schema": 1}', '{"schema": 1, "rows": {"rows": 0}}'):
        storage.write_bytes(place, broken.encode())
        with pytest.raises(EyasError):
            Store.open(full)


def test_a_marker_without_checksums_is_refused(full):
    edit(f"{full}/commits/000001.json", lambda m: m.pop("crc32c"))
    with pytest.raises(EyasError, match=r"000001\.json has no crc32c; delete it"):
        Store.open(full).read(["argmax"], [4])


def test_newer_schema_is_refused(full):
    edit(f"{full}/manifest.json", lambda m: m.update(schema=2))
    with pytest.raises(EyasError, match="schema 2, newer than 1"):
        Store.open(full)


def test_partial_store_says_how_to_go_on(url):
    write_blocks(url, features(), [0, 2])
    store = Store.open(url)
    with pytest.raises(EyasError, match=r"partial: 1 of 3 blocks are missing \(the first is 1\)"):
        store.require_complete()
    store.read(["argmax"], [0, 6])
    with pytest.raises(EyasError, match="block 1"):
        store.read(["argmax"], [0, 4])
    assert verify(url)["missing_blocks"] == 1
    write_blocks(url, features())
    store.read(["argmax"], [4])  # committed since the store was opened


def test_store_of_another_model(full):
    store = Store.open(full)
    store.require_target("a" * 64)
    with pytest.raises(EyasError, match=r"of another model \(tiny, LlamaForCausalLM"):
        store.require_target("b" * 64)


def test_other_features_are_refused_by_field(full):
    other = described(features()) | {"block_rows": 5, "codec": {"name": "topk", "k": 64}}
    before = storage.read_bytes(f"{full}/manifest.json")
    with pytest.raises(
        EyasError, match=r"block_rows: 3 there, 5 here; codec\.k: null there, 64 here"
    ) as found:
        create_features(full, other)
    assert "\n" not in str(found.value)
    assert storage.read_bytes(f"{full}/manifest.json") == before


def test_unknown_names_and_rows(full):
    with pytest.raises(EyasError, match="no array logits; it has tokens"):
        Store.open(full).read(["logits"], [0])
    with pytest.raises(EyasError, match="rows 0 to 6; row 7"):
        Store.open(full).read(["argmax"], [0, 7])


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


def contents(folder) -> dict[str, bytes]:
    return {
        os.path.relpath(path, folder): storage.read_bytes(path)
        for where, _, names in os.walk(folder)
        if "features" not in where
        for path in (os.path.join(where, name) for name in names)
    }


def test_full_disk_is_one_line_and_resumable(url):
    """A limit on the size of a file stands in for a full disk: TensorStore sees a failing write."""
    script = (
        "import resource, sys; sys.path.insert(0, '.');"
        "from tests.common import test_store as t;"
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
