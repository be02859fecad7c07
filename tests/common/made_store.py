"""A small feature store made without a target: rows, features, markers."""

import json
import os
import re
import threading
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from common import safetensors, storage
from common.checked import sha256
from common.errors import EyasError
from common.store import tensor_file
from common.store_verify import verify
from common.store_writer import FeatureWriter, create_features, describe_arrays, write_rows

R, T, A, H, V, BLOCK = 7, 12, 3, 8, 50, 3  # the last block has one row

TARGET = {
    "config.json": b'{"hidden_size": 8}',
    tensor_file("embed_tokens"): safetensors.to_bytes({"embed_tokens": np.ones((V, H), np.float32)}),
    tensor_file("lm_head"): safetensors.to_bytes({"lm_head": np.zeros((V, H), np.float32)}),
}


def require_named(name: str, *uses: Callable[[], object]) -> None:
    """Each use is refused in one line, in which `name` stands."""
    for use in uses:
        with pytest.raises(EyasError, match=re.escape(name)) as found:
            use()
        assert "\n" not in str(found.value)


def at_once(do: Callable[[int], None], count: int = 4) -> None:
    """do(0) .. do(count - 1), each in a thread."""
    threads = [threading.Thread(target=do, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


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


def write_blocks(url, values, blocks=None, **more) -> None:
    create_features(url, described(values) | more)
    with FeatureWriter(url) as writer:
        for name, data in TARGET.items():
            storage.write_bytes(f"{url}/target/{name}", data)
        for block in blocks or range(writer.store.blocks):
            own = writer.store.block_range(block)
            writer.write(block, {n: v[own.start : own.stop] for n, v in values.items()}, 10, 5)


def edit(path: str, change) -> None:
    """Written as our own files are, but for numbers that JSON does not have."""
    value = storage.read_json(path)
    change(value)
    storage.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def contents(folder) -> dict[str, bytes]:
    return {
        os.path.relpath(path, folder): storage.read_bytes(path)
        for where, _, names in os.walk(folder)
        if "features" not in where
        for path in (os.path.join(where, name) for name in names)
    }


def problem(url: str) -> str:
    """What verify finds, "" if nothing; always lines."""
    try:
        found = verify(url)
    except EyasError as error:
        lines = [str(error)]
    else:
        lines = found["damaged"] + (["blocks are missing"] if found["missing_blocks"] else [])
    assert not any("\n" in line for line in lines)
    return "; ".join(lines)
