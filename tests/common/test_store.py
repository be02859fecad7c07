"""The store gives back what was written, or an error of one line; never a number that was not written."""

import os

import ml_dtypes
import numpy as np
import pytest

from common import zarr
from common.errors import EyasError
from common.store import Store
from common.store_verify import verify
from tests.common.made_store import A, H, R, T, V, features, rows, write_blocks

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn}


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


def test_no_store_and_no_features(tmp_path, url):
    with pytest.raises(EyasError, match="is no feature store"):
        Store.open(f"{tmp_path}/nothing")
    store = Store.open(url)
    with pytest.raises(EyasError, match="no features yet; run dump"):
        store.require_complete()
    with pytest.raises(EyasError, match="no features yet; run dump"):
        store.read(["aux_hidden"], [0])


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


def test_unknown_names_and_rows(full):
    with pytest.raises(EyasError, match="no array logits; it has tokens"):
        Store.open(full).read(["logits"], [0])
    with pytest.raises(EyasError, match="rows 0 to 6; row 7"):
        Store.open(full).read(["argmax"], [0, 7])
