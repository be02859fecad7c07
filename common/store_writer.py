"""The feature store, write side: rows once, then features block by block, each committed by its marker.

The manifest is claimed before what it names is written (see common/manifest.py), arrays are made where there
are none, and nothing is deleted: a second writer continues what it finds, or is refused.
"""

import io
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tensorstore as ts

from common import kvstore, stopping, storage, zarr
from common.checked import sha256
from common.config import differences
from common.errors import EyasError
from common.library_errors import library_errors
from common.manifest import COLUMNS, INDEX, MANIFEST, ROW_SUMS, SCHEMA, make_marker, read_manifest
from common.progress import Progress
from common.store import Store

_LAST_SECONDS = 8.0  # for the blocks in flight when a dump is stopped or has failed
_IN_FLIGHT = 8 << 30  # bytes, or an eighth of the machine's memory if that is less
_WRITERS = 16  # blocks written at once: a small one in a bucket is a second of waiting


def write_rows(
    url: str,
    columns: Mapping[str, Any],
    token_counts: np.ndarray,
    index: Any,
    rows_manifest: dict[str, Any],
) -> None:
    """Makes a store of packed rows. The manifest says `unfinished` until all is written; an interrupted call
    is made again with the same rows.

    `columns`: tokens, segment_ids, positions int32 and loss_mask uint8, each [R, T]: arrays, or anything that
    gives some rows for a slice. Each is read twice, a shard at a time, for its sums and to be written.
    `token_counts` int64 [V]; `index`: a line a conversation, an Arrow table or stream; `rows_manifest` needs
    rows, length, vocab_size, and gets the arrays and sums. EyasError if there is a store already, other rows
    were begun, or the disk is full.
    """
    url = url.rstrip("/")
    R, T = rows_manifest["rows"], rows_manifest["length"]
    arrays = {name: zarr.describe((R, T), np.dtype(dtype)) for name, dtype in COLUMNS.items()}
    arrays["token_counts"] = zarr.describe(token_counts.shape, token_counts.dtype)
    sums = {name: np.zeros(R, np.uint32) for name in COLUMNS}
    with Progress("sum rows", len(COLUMNS) * R, "row") as bar:
        for name in COLUMNS:
            for rows in _shards(arrays[name]):
                sums[name][rows.start : rows.stop] = zarr.row_sums(columns[name][rows.start : rows.stop])
                bar.update(len(rows))
    files = {INDEX: parquet(index), ROW_SUMS: parquet(pa.table(sums))}
    manifest = rows_manifest | {
        "arrays": arrays,
        "files": {name: sha256(data) for name, data in files.items()},
        "token_counts_crc32": zarr.crc32(token_counts),
    }
    if not _claim_rows(url, manifest):
        return
    storage.remove_partial(url)
    with Progress("write rows", len(COLUMNS) * R, "row") as bar:
        for name in COLUMNS:
            _write_column(f"{url}/rows/{name}", arrays[name], columns[name], bar)
    place = f"{url}/rows/token_counts"
    _write_whole(place, zarr.open_array(place, arrays["token_counts"], create=True), token_counts)
    for name, data in files.items():
        storage.write_bytes(f"{url}/{name}", data)
    _finish_rows(url, manifest)


def _shards(described: dict[str, Any]) -> Iterator[range]:
    """The rows of each shard of an array [R, T]."""
    rows, size = described["shape"][0], described["shard"][0]
    for start in range(0, rows, size):
        yield range(start, min(start + size, rows))


def _write_column(place: str, described: dict[str, Any], column: Any, bar: Progress) -> None:
    """Writes a column shard by shard, each whole and once; the next is made while one is written."""
    array = zarr.open_array(place, described, create=True)
    pending: deque[tuple[int, Any]] = deque()
    with library_errors(place):
        for rows in _shards(described):
            value = column[rows.start : rows.stop]
            write = array[rows.start : rows.stop].write(value, can_reference_source_data_indefinitely=True)
            write.commit.force()
            pending.append((len(rows), write))
            if len(pending) > 1:
                _finish_shard(pending, bar)
        while pending:
            _finish_shard(pending, bar)


def _finish_shard(pending: deque[tuple[int, Any]], bar: Progress) -> None:
    rows, write = pending.popleft()
    kvstore.result(write.commit)
    bar.update(rows)


def _write_whole(place: str, array: ts.TensorStore, value: np.ndarray) -> None:
    with library_errors(place):
        kvstore.result(array.write(value).commit)


def parquet(lines: Any) -> bytes:
    """An Arrow table or stream as a Parquet file; each batch is a row group."""
    sink, reader = io.BytesIO(), pa.RecordBatchReader.from_stream(lines)
    with pyarrow.parquet.ParquetWriter(sink, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
    return sink.getvalue()


def _claim_rows(url: str, rows: dict[str, Any]) -> bool:
    """Whether the rows are to be written; False if somebody with the same rows has done it meanwhile."""
    begun = storage.json_bytes({"schema": SCHEMA, "rows": rows, "unfinished": True})
    if kvstore.create_file(f"{url}/{MANIFEST}", begun):
        return True
    found = read_manifest(url, unfinished=True)
    if not found.get("unfinished"):
        if found["rows"] == rows:
            return False
        raise EyasError(f"{url} is a store already; name a new one, or delete it first")
    different = differences(found["rows"], rows)
    if different:
        raise EyasError(
            f"{url} holds the beginning of other rows: {'; '.join(different[:3])}; run the command that "
            "began them, name a new store, or delete it first"
        )
    return True


def _finish_rows(url: str, rows: dict[str, Any]) -> None:
    place = f"{url}/{MANIFEST}"
    begun, found = storage.read_bytes(place), read_manifest(url, unfinished=True)
    whole = storage.json_bytes({"schema": SCHEMA, "rows": rows})
    if found["rows"] == rows and (not found.get("unfinished") or kvstore.replace_file(place, begun, whole)):
        return
    if read_manifest(url, unfinished=True)["rows"] != rows:  # or somebody with the same rows was faster
        raise EyasError(f"{place} was changed while rows were written; prepare a new store")


def describe_arrays(shapes: dict[str, tuple[tuple[int, ...], Any]], block_rows: int) -> dict[str, Any]:
    """The manifest's features.arrays of {name: (shape [R, T, ...], dtype)}; a block is whole shards."""
    return {
        name: zarr.describe(shape, np.dtype(dtype), block_rows) for name, (shape, dtype) in shapes.items()
    }


def raw_bytes(described: dict[str, Any]) -> int:
    """The bytes of the numbers in a manifest's `arrays` section."""
    return sum(math.prod(a["shape"]) * np.dtype(a["dtype"]).itemsize for a in described.values())


def find_features(url: str, features: dict[str, Any]) -> dict[str, Any] | None:
    """The store's own section if it has these features (to be continued), None if it has none yet.

    `features` may lack the sums of target/, which are then those that the store has, as are scales of
    channels in any case. EyasError naming the fields that differ. Nothing is written.
    """
    found = read_manifest(url).get("features")
    if found is None:
        return None
    # A folder may be renamed while its contents stay; scales are those of whoever came first.
    ignored = ["target.name:", "channels"] + ([] if "target_files" in features else ["target_files:"])
    different = [line for line in differences(found, features) if not line.startswith(tuple(ignored))]
    if different:
        # The arrays follow from the other fields; they are named only when nothing else differs.
        named = [line for line in different if not line.startswith("arrays.")] or different
        raise EyasError(
            f"{url} was dumped otherwise: {'; '.join(named)}; use the same options, or a new store"
        )
    return found


def _claim_features(url: str, features: dict[str, Any]) -> None:
    place = f"{url}/{MANIFEST}"
    while True:
        rows = storage.read_bytes(place)  # before the look: what is replaced must have no features either
        if find_features(url, features) is not None:
            return
        claimed = storage.json_bytes(read_manifest(url) | {"features": features})
        if kvstore.replace_file(place, rows, claimed):
            return


def create_features(url: str, features: dict[str, Any], draft_ids: np.ndarray | None = None) -> None:
    """Puts the features into the manifest and makes their arrays, or finds them there.

    `draft_ids` int32 [N]: the ids behind draft_logprobs. EyasError as `find_features`, MachineError when the
    disk is full.
    """
    url = url.rstrip("/")
    _claim_features(url, features)
    store = Store.open(url)
    for name, described in store.features["arrays"].items():
        zarr.open_array(f"{url}/features/{name}", described, create=True)
    if draft_ids is not None and not _has_draft_ids(store):
        described = zarr.describe(draft_ids.shape, draft_ids.dtype)
        place = f"{url}/features/draft_ids"
        _write_whole(place, zarr.open_array(place, described, create=True), draft_ids)
        store.draft_ids()  # the manifest's


def _has_draft_ids(store: Store) -> bool:
    try:
        return store.draft_ids() is not None
    except EyasError:
        return False


class FeatureWriter:
    """Writes blocks of features in the background; `write` waits while more than `in_flight` bytes are held.

    Use as a context manager: leaving it waits for what is in flight, after an error or a request to stop for
    some seconds only. A block is committed when its marker is there, and the marker is written when every
    array of the block is on disk (fsync) or in the bucket. Whatever keeps a block from being committed is
    raised, by a later `write` or when the context is left.
    """

    def __init__(self, url: str, in_flight: int | None = None):
        """Opens a store in which `create_features` has made the features. One block is always in flight."""
        self.store = Store.open(url)
        self._arrays = {
            name: zarr.open_array(f"{self.store.url}/features/{name}", described)
            for name, described in self.store.features["arrays"].items()
        }
        self._limit = min(_IN_FLIGHT, _memory() // 8) if in_flight is None else in_flight
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="block-writer")
        self._pending: deque[tuple[int, Future]] = deque()  # (bytes, the block's outcome)

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> None:
        """Queues a block {name: [rows of the block, T, ...]} of the arrays that have its rows; its marker
        also holds the two counts of tokens.

        The arrays must not change until the block is written. Raises what kept an earlier block from being
        committed, and Stopped if asked to stop while it waits.
        """
        assert set(values) == set(self.store.arrays_in(block)), (block, sorted(values))
        size = sum(value.nbytes for value in values.values())
        self._pending.append((size, self._pool.submit(self._write, block, values, tokens, counted)))
        while len(self._pending) > 1 and (self._pending[0][1].done() or self._bytes() > self._limit):
            self._await_oldest()

    def _bytes(self) -> int:
        return sum(size for size, _ in self._pending)

    def _await_oldest(self) -> None:
        stopping.awaited(self._pending[0][1], stopping.check)  # a server may not answer for minutes
        self._pending.popleft()

    def _write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> None:
        rows, place = self.store.block_range(block), self.store.marker_place(block)
        if storage.exists(place):
            return  # another dump was faster: what is committed is never written again
        with library_errors(f"{self.store.url} block {block} of {self.store.blocks}"):
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
        marker = make_marker(self.store.hash, block, rows, tokens, counted, sums)
        if not kvstore.create_file(place, storage.json_bytes(marker)) and self.store.commit(block) != marker:
            raise EyasError(
                f"{place} was written by another dump at the same time, with other numbers; stop one of the "
                "two, delete that file and run the same dump command"
            )

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            while kind is None and self._pending:
                self._await_oldest()
        finally:
            # A machine that is taken away leaves seconds, and where a process has failed the others wait:
            # what is not on disk by then is written again.
            self._pool.shutdown(wait=False, cancel_futures=True)
            wait([outcome for _, outcome in self._pending if not outcome.cancelled()], _LAST_SECONDS)


def _memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
