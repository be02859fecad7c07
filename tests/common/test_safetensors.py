"""Safetensors folders: what is written reads back in slices, and every damage is refused in one line."""

import json
import os

import fsspec
import ml_dtypes
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError, RestartError
from common.safetensors import INDEX, SINGLE, Checkpoint

TENSORS = {
    "a": np.arange(60, dtype=np.float32).reshape(6, 10),
    "b": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "c": np.arange(8).astype(ml_dtypes.float8_e4m3fn),
    "scalar": np.float32(3.5).reshape(()),
}


def test_the_same_tensors_and_metadata_are_the_same_bytes():
    """Whatever the library's order of metadata, so that a head that is exported again has its checksum."""
    metadata = {"made": '{"step": "3 of \u00e4"}', "about": "a", "z": ""}
    first = safetensors.to_bytes(TENSORS, metadata)
    assert all(safetensors.to_bytes(TENSORS, dict(reversed(metadata.items()))) == first for _ in range(8))
    start = 8 + int.from_bytes(first[:8], "little")
    assert start % 8 == 0
    assert json.loads(first[8:start])["__metadata__"] == metadata | {"format": "pt"}
    found = safetensors.from_bytes(first)
    assert all(found[name].tobytes() == value.tobytes() for name, value in TENSORS.items())


def sharded(folder, shard_of=lambda name: f"model-{name}.safetensors"):
    """Each tensor in a file of its own, and an index."""
    for name, value in TENSORS.items():
        safetensors.write(f"{folder}/model-{name}.safetensors", {name: value})
    storage.write_json(f"{folder}/{INDEX}", {"weight_map": {name: shard_of(name) for name in TENSORS}})
    return str(folder)


@pytest.mark.parametrize("remote", [False, True])
def test_slices_equal_the_arrays(tmp_path, remote):
    folder = f"memory://{tmp_path.name}" if remote else str(tmp_path)
    safetensors.write(f"{folder}/{SINGLE}", TENSORS, {"made": "here"})
    found = Checkpoint.open(folder)
    for name, value in TENSORS.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(read, value)
    np.testing.assert_array_equal(found.read("a", (slice(2, 5), slice(1, 7))), TENSORS["a"][2:5, 1:7])
    np.testing.assert_array_equal(found.read("b", (slice(1, 2),)), TENSORS["b"][1:2])
    assert found.read("a", (slice(4, 4),)).shape == (0, 10)


@pytest.mark.parametrize("piece", [1, 90, 1 << 20])
@pytest.mark.parametrize("index", [(slice(1, 5), slice(3, 4)), (slice(0, 6), slice(0, 10)), (slice(2, 5),)])
def test_columns_of_a_local_file_are_read_in_pieces(tmp_path, monkeypatch, index, piece):
    monkeypatch.setattr(safetensors, "_PIECE", piece)
    safetensors.write(f"{tmp_path}/{SINGLE}", TENSORS)
    np.testing.assert_array_equal(Checkpoint.open(str(tmp_path)).read("a", index), TENSORS["a"][index])


@pytest.mark.parametrize("index", [(), (slice(3, 6),), (slice(0, 6), slice(1, 2))])
def test_a_file_that_is_cut_off_after_it_was_opened_is_one_line(tmp_path, index):
    """A mapped one would end the process without a word."""
    safetensors.write(f"{tmp_path}/{SINGLE}", {"a": TENSORS["a"]})
    found = Checkpoint.open(str(tmp_path))
    os.truncate(tmp_path / SINGLE, os.path.getsize(tmp_path / SINGLE) - 4)
    with pytest.raises(EyasError, match=r"model\.safetensors was changed while it was read; run the same"):
        found.read("a", index)


def test_a_remote_slice_fetches_only_its_rows(monkeypatch):
    safetensors.write(f"memory://ranged/{SINGLE}", TENSORS)
    found = Checkpoint.open("memory://ranged")
    asked = []
    memory = type(fsspec.filesystem("memory"))
    whole = memory.cat_file

    def count(self, path, start=None, end=None, **more):
        asked.append(end - start)
        return whole(self, path, start, end, **more)

    monkeypatch.setattr(memory, "cat_file", count)
    found.read("a", (slice(2, 4),))
    assert asked == [2 * 10 * 4]


def test_shards_are_joined(tmp_path):
    found = Checkpoint.open(sharded(tmp_path))
    assert sorted(found.tensors) == sorted(TENSORS)
    np.testing.assert_array_equal(found.read("a", (slice(1, 3),)), TENSORS["a"][1:3])


def refused(folder, *words):
    with pytest.raises(EyasError) as error:
        Checkpoint.open(str(folder))
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    (tmp_path / "model-b.safetensors").unlink()
    refused(folder, "model-b.safetensors", "1 of 4", "fetch")


@pytest.mark.parametrize("path", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"])
def test_an_index_cannot_point_outside(tmp_path, path):
    refused(sharded(tmp_path, lambda name: path), "outside", path)


def test_an_index_cannot_name_a_pickle(tmp_path):
    refused(sharded(tmp_path, lambda name: "pytorch_model.bin"), "pytorch_model.bin", ".safetensors")


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path):
    folder = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-a.safetensors"
    storage.write_json(f"{folder}/{INDEX}", index)
    refused(folder, "ghost", "model-a.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    safetensors.write(f"{tmp_path}/{SINGLE}", TENSORS)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:keep])
    refused(tmp_path, SINGLE, "cut off")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "does not fit"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}, "Q4"),
        ({"dtype": "F32", "shape": [4]}, "damaged"),
        ([], "damaged"),
        (None, "damaged"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "['F32']"),
        ({"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "F32", "shape": [10**300], "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "F32", "shape": [2**40] * 100_000, "data_offsets": [0, 16]}, "no list of numbers"),
        ({"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}, "no list of numbers"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}, "damaged"),
        ({"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "cut off"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, entry, word):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(tmp_path, word, "x")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"[" * 50_000 + b"]" * 50_000, "nested"),
        (b" 5", "damaged"),
        (b'{"x": NaN}', "NaN"),
        (
            b'{"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
            b' "x": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}',
            "'x' is named twice",
        ),
        (
            b'{"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
            b' "y": {"dtype": "U8", "shape": [8], "data_offsets": [7, 15]}}',
            "x and y share bytes",
        ),
    ],
)
def test_a_header_of_another_kind_is_refused(tmp_path, header, word):
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(tmp_path, word, SINGLE)


@pytest.mark.parametrize("index", [[], 5, None, {"weight_map": []}, {"weight_map": {"a": 5}}])
def test_an_index_of_another_kind_is_refused(tmp_path, index):
    folder = sharded(tmp_path)
    storage.write_json(f"{folder}/{INDEX}", index)
    refused(folder, INDEX)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    safetensors.write(f"{folder}/model-b.safetensors", {name: TENSORS[name] for name in "ab"})
    refused(folder, "two of its shards have a")


def test_folders_without_safetensors_are_refused(tmp_path):
    refused(tmp_path / "nowhere", SINGLE)
    refused(tmp_path, SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "pytorch_model.bin", "convert to safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("z", (6, 10), ["lacks", "z"]),
        ("a", (10, 6), ["[6, 10]", "[10, 6]"]),
        ("c", (8,), ["float8_e4m3fn", "bfloat16"]),
    ],
)
def test_require_names_what_differs(tmp_path, name, shape, words):
    safetensors.write(f"{tmp_path}/{SINGLE}", TENSORS)
    with pytest.raises(EyasError) as error:
        Checkpoint.open(str(tmp_path)).require(name, shape)
    for word in [name, *words]:
        assert word in str(error.value)


def test_a_file_that_is_replaced_while_it_is_read_gives_no_mixture(tmp_path):
    safetensors.write(f"{tmp_path}/{SINGLE}", TENSORS)
    opened = Checkpoint.open(str(tmp_path))
    opened.read("a")
    safetensors.write(f"{tmp_path}/{SINGLE}", TENSORS)
    with pytest.raises(RestartError, match=r"model.safetensors was changed while it was read; run the same"):
        opened.read("b")
