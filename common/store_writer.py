"""The feature store, write side: rows once, then features block by block, each committed by its marker."""

import hashlib
import io
import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from common import storage, zarr
from common.config import differences
from common.errors import EyasError
from common.storage import readable_errors
from common.store import INDEX, MANIFEST, SCHEMA, Store, read_manifest


def write_rows(
    url: str,
    columns: dict[str, np.ndarray],
    token_counts: np.ndarray,
    index: pa.Table,
    rows_manifest: dict[str, Any],
) -> None:
    """Makes a store of packed rows; the manifest is written last, so an interrupted one is no store.

    `columns`: tokens, segment_ids, positions int32 and loss_mask uint8, each [R, T]; `token_counts` int64
    [V]; `index`: a line a conversation; `rows_manifest` needs rows, length, vocab_size, and gets "arrays" and
    "index_sha256". EyasError if there is a store already or the disk is full.
    """
    url = url.rstrip("/")
    if storage.exists(f"{url}/{MANIFEST}"):
        raise EyasError(f"{url} is a store already; name a new one, or delete it first")
    described = {}
    with readable_errors(url):
        storage.remove_partial(url)
        for name, value in (columns | {"token_counts": token_counts}).items():
            rows = zarr.shard_rows(value.shape, value.dtype)
            place = f"{url}/rows/{name}"
            zarr.create(place, value.shape, value.dtype, rows).write(value).commit.result()
            described[name] = _describe(value.shape, value.dtype) | {"crc32": zarr.crc32(value)}
        sink = io.BytesIO()
        pyarrow.parquet.write_table(index, sink)
        storage.write_bytes(f"{url}/{INDEX}", sink.getvalue())
        extra = {"arrays": described, "index_sha256": hashlib.sha256(sink.getvalue()).hexdigest()}
        storage.write_json(f"{url}/{MANIFEST}", {"schema": SCHEMA, "rows": rows_manifest | extra})


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    chunk = zarr.chunk_shape(shape, dtype)
    return {"shape": list(shape), "dtype": np.dtype(dtype).name, "chunk": list(chunk)}


def describe_arrays(shapes: dict[str, tuple[tuple[int, ...], Any]]) -> dict[str, Any]:
    """The manifest's features.arrays of {name: (shape [R, T, ...], dtype)}."""
    return {name: _describe(shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}


def raw_bytes(described: dict[str, Any]) -> int:
    """The bytes of the numbers in a manifest's `arrays` section."""
    return sum(math.prod(a["shape"]) * np.dtype(a["dtype"]).itemsize for a in described.values())


def refuse_other_features(url: str, features: dict[str, Any]) -> bool:
    """True if the store already has exactly these features (to be continued), False if it has none.

    EyasError naming the fields that differ. Nothing is written.
    """
    found = read_manifest(url).get("features")
    if found is None:
        return False
    # A folder may be renamed while its contents stay.
    different = [line for line in differences(found, features) if not line.startswith("target.name:")]
    if different:
        # The arrays follow from the other fields; they are named only when nothing else differs.
        named = [line for line in different if not line.startswith("arrays.")] or different
        raise EyasError(
            f"{url} was dumped otherwise: {'; '.join(named)}; use the same options, or a new store"
        )
    return True


def _create_features(url: str, features: dict[str, Any], draft_ids: np.ndarray | None) -> None:
    manifest = read_manifest(url)
    with readable_errors(url):
        for name, a in features["arrays"].items():
            place = f"{url}/features/{name}"
            zarr.create(place, tuple(a["shape"]), np.dtype(a["dtype"]), features["block_rows"], checked=False)
        if draft_ids is not None:
            place = f"{url}/features/draft_ids"
            zarr.create(place, draft_ids.shape, draft_ids.dtype, len(draft_ids)).write(
                draft_ids
            ).commit.result()
        storage.write_json(f"{url}/{MANIFEST}", manifest | {"features": features})


class FeatureWriter:
    """Writes blocks of features in the background, `in_flight` at a time; a full queue makes `write` wait.

    Use as a context manager: leaving it waits for what is in flight. A block is committed when its marker is
    there, and the marker is written when every array of the block is on disk (fsync) or in the bucket.
    """

    def __init__(
        self,
        url: str,
        features: dict[str, Any],
        draft_ids: np.ndarray | None = None,
        in_flight: int = 2,
    ):
        """Makes the arrays and the manifest's features section, or continues them.

        `draft_ids` int32 [N]: the ids behind draft_logits. EyasError as `refuse_other_features`, or when the
        disk is full.
        """
        url = url.rstrip("/")
        if not refuse_other_features(url, features):
            _create_features(url, features, draft_ids)
        self.store = Store.open(url)
        self._arrays = {
            name: zarr.open_array(f"{url}/features/{name}", tuple(a["shape"]), np.dtype(a["dtype"]))
            for name, a in features["arrays"].items()
        }
        self._free = threading.Semaphore(in_flight)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="block-writer")
        self._failed: EyasError | None = None

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> Future:
        """Queues a block {name: [rows of the block, T, ...]}; its marker also holds the two counts of tokens.

        The arrays must not change until the future is done. Raises the EyasError of an earlier block that
        could not be written.
        """
        assert values.keys() == self._arrays.keys(), (sorted(values), sorted(self._arrays))
        self._free.acquire()
        if self._failed is not None:
            self._free.release()
            raise self._failed
        return self._pool.submit(self._write, block, values, tokens, counted)

    def _write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> None:
        rows = self.store.block_range(block)
        try:
            with readable_errors(f"{self.store.url} block {block} of {self.store.blocks}"):
                writes = [
                    self._arrays[name][rows.start : rows.stop].write(
                        value, can_reference_source_data_indefinitely=True
                    )
                    for name, value in values.items()
                ]
                for request in writes:
                    request.commit.force()
                sums = {name: zarr.row_sums(value) for name, value in values.items()}
                for request in writes:
                    request.commit.result()
                marker = {
                    "store": self.store.hash,
                    "block": block,
                    "rows": [rows.start, rows.stop],
                    "tokens": tokens,
                    "counted": counted,
                    "crc32c": sums,
                }
                storage.write_json(f"{self.store.url}/commits/{block:06d}.json", marker)
        except EyasError as error:
            self._failed = self._failed or error
            raise
        finally:
            self._free.release()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None and self._failed is not None:
            raise self._failed
