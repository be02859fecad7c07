"""Stores of made-up numbers, and blocks that cost no forward pass: what remains is reading and writing."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from common import storage
from common.checked import sha256
from common.manifest import COLUMNS, INDEX, MANIFEST, ROW_SUMS, SCHEMA, make_marker
from common.store import Store
from common.store_writer import create_features, describe_arrays, parquet, write_rows
from common.zarr import describe


def kinds(rows: int, length: int, hidden: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of a dump in bfloat16 that keeps no logits."""
    return {
        "aux_hidden": ((rows, length, 3, hidden), jnp.bfloat16),
        "last_hidden": ((rows, length, hidden), jnp.bfloat16),
        "argmax": ((rows, length), np.int32),
        "logsumexp": ((rows, length), np.float32),
    }


def features(rows: int, length: int, hidden: int, block_rows: int) -> dict[str, Any]:
    """The manifest's section of such a dump."""
    return {
        "target": {"name": "none", "architecture": "none", "config_hash": "0" * 64}
        | {"hidden_size": hidden, "vocab_size": 8, "layers": 8},
        "aux_layers": [2, 4, 5],
        "codec": {"name": "none", "size": 0},
        "precision": "bfloat16",
        "block_rows": block_rows,
        "arrays": describe_arrays(kinds(rows, length, hidden), block_rows),
        "target_files": {},
    }


def empty_store(url: str, rows: int, length: int, hidden: int, block_rows: int) -> Store:
    """A store of such a dump before its first block; every position counts."""
    columns = {name: np.ones((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    columns["loss_mask"] = np.ones((rows, length), np.uint8)
    index = pa.table({"id": ["a"], "split": ["train"], "row": [0], "length": [length]})
    manifest = {"rows": rows, "length": length, "vocab_size": 8}
    write_rows(url, columns, np.ones(8, np.int64), index, manifest)
    create_features(url, features(rows, length, hidden, block_rows))
    return Store.open(url)


def huge_store(url: str, rows: int, length: int, block_rows: int, committed: list[int]) -> Store:
    """As much of a store of so many rows as is read before the first row: the manifest, sums of rows, the
    markers of the blocks `committed`, but no array."""
    rng = np.random.default_rng(0)
    sums = pa.table({name: pa.array(rng.integers(0, 2**32, rows, np.uint32)) for name in COLUMNS})
    index = pa.table({"id": ["a"], "split": ["train"], "row": [0], "length": [length]})
    files = {INDEX: parquet(index), ROW_SUMS: parquet(sums)}
    arrays = {name: describe((rows, length), np.dtype(dtype)) for name, dtype in COLUMNS.items()}
    arrays["token_counts"] = describe((8,), np.dtype(np.int64))
    described = {"rows": rows, "length": length, "vocab_size": 8, "arrays": arrays, "token_counts_crc32": 0}
    described["files"] = {name: sha256(data) for name, data in files.items()}
    for name, data in files.items():
        storage.write_bytes(f"{url}/{name}", data)
    made = features(rows, length, 5120, block_rows)
    storage.write_json(f"{url}/{MANIFEST}", {"schema": SCHEMA, "rows": described, "features": made})
    store = Store.open(url)
    for number, block in enumerate(committed):
        own = store.block_range(block)
        marker = make_marker(store.hash, block, own, 0, 0, {name: [0] * len(own) for name in made["arrays"]})
        if number == 0:
            storage.write_json(store.marker_place(block), marker)
        else:  # not fsynced: there are thousands
            with open(store.marker_place(block), "wb") as file:
                file.write(storage.json_bytes(marker))
    return store


@dataclass(frozen=True)
class MadePlan:
    """As much of a dump's Plan as its rounds need."""

    store: Store
    blocks: tuple[int, ...]

    @property
    def features(self) -> dict[str, Any]:
        """The manifest's section."""
        return self.store.features

    def rows_of(self, block: int) -> range:
        """The rows of a block."""
        return self.store.block_range(block)


class MadePrefill:
    """Takes the place of a Prefill: every batch of `rows` rows has the same values, and is there at once."""

    def __init__(self, rows: int, length: int, hidden: int):
        self.rows = rows
        rng = np.random.default_rng(0)
        self._values = {
            name: rng.integers(0, 200, shape, np.uint8).astype(dtype)
            for name, (shape, dtype) in kinds(rows, length, hidden).items()
        }

    def __call__(self, *_: np.ndarray) -> "MadePrefill":
        return self

    def into(self, host: dict[str, np.ndarray]) -> None:
        """Fills {name: [n <= rows, T, ...]}."""
        for name, value in host.items():
            value[:] = self._values[name][: len(value)]
