"""Arrays on disk: zarr v3 through TensorStore, a block of rows in whole shards of inner chunks.

The shard (`sharding_indexed`) is one file or object, and the unit of writing: it is written whole and once,
because a partial write rewrites all of it. A block has as many as keep each below `SHARD_BYTES`, so that a
wide block goes to a bucket in many requests at once. The inner chunk is the unit of reading: a row, an equal
part of the positions of a row that is larger than `CHUNK_BYTES`, or some small rows. Chunks that lie beside
each other are read in one request, and a shard's index once. Chunks are raw little-endian bytes,
uncompressed: states hardly shrink. A flipped bit is an error and never a number: every row has a crc32c,
which the store keeps beside the arrays (TensorStore computes zarr's own at 2 GB/s, `google_crc32c` this one
in hardware at 9), and the index of a shard has zarr's. Chunks that equal the fill value are stored, so that a
missing one is an error too. What an array is (shape, dtype, chunks) is said by the manifest, and its
zarr.json must agree.

Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/v1.0.html
"""

import itertools
import math
import zlib
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
import tensorstore as ts

from common import kvstore, storage
from common.divisors import largest_divisor
from common.errors import DamagedError, EyasError
from common.library_errors import explained, is_refusal, reason, waiting

CHUNK_BYTES = 10_000_000  # above this, reading a row is split
GATHERED_BYTES = 64 << 10  # up to this, rows are read together: a chunk costs 6 us, however small it is
SHARD_BYTES = 256_000_000  # above this, writing a block is split
ROWS_SHARD_BYTES = 64 << 20  # of arrays that have no blocks
_NAMED = 8  # rows that an error names
_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}]


def describe(shape: tuple[int, ...], dtype: np.dtype, block_rows: int | None = None) -> dict[str, Any]:
    """What the manifest says of an array: shape, dtype, inner chunk and shard; a block is whole shards."""
    shard, chunk = layout(shape, dtype, block_rows)
    named = {"shape": list(shape), "dtype": np.dtype(dtype).name}
    return named | {"chunk": list(chunk), "shard": list(shard)}


def layout(
    shape: tuple[int, ...], dtype: np.dtype, block_rows: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shard, inner chunk) of an array [R, T, ...].

    The shard: the most whole rows that divide a block and fit into `SHARD_BYTES`, or the largest equal part,
    of whole chunks, of a row that does not fit. Without blocks, as many rows as fit into `ROWS_SHARD_BYTES`.
    The chunk: an equal part of a row, or of the shard's rows as many as fit into `GATHERED_BYTES`.
    """
    if len(shape) < 2:
        return shape, shape
    (R, T), rest = shape[:2], shape[2:]
    token = math.prod(rest) * np.dtype(dtype).itemsize
    row, gathered = T * token, max(1, GATHERED_BYTES // (T * token))
    if block_rows is None:
        rows = min(R, gathered)
        return (rows * max(1, min(-(-R // rows), ROWS_SHARD_BYTES // (rows * row))), T, *rest), (
            rows,
            T,
            *rest,
        )
    part = largest_divisor(T, CHUNK_BYTES // token)
    if row <= SHARD_BYTES:
        rows = largest_divisor(block_rows, SHARD_BYTES // row)
        return (rows, T, *rest), (largest_divisor(rows, gathered), part, *rest)
    return (1, part * largest_divisor(T // part, SHARD_BYTES // (part * token)), *rest), (1, part, *rest)


def open_array(
    url: str, described: dict[str, Any], create: bool = False, indices: bool = False
) -> ts.TensorStore:
    """The array at `url`; with `create` it is made where there is none, and never deleted.

    With `indices` those of its shards in a bucket stay in memory, for whoever reads a shard in several
    requests. Each takes 4 kB or more, so that nothing is kept of what is written, or of a local file, whose
    index is read again in 10 us.
    EyasError if it is missing, damaged, or not as `described` by `describe`. MachineError if the
    machine or the network fails.
    """
    storage.require_no_device(f"{url}/zarr.json")
    codec = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": described["chunk"],
            "codecs": _BYTES,
            "index_codecs": [*_BYTES, {"name": "crc32c"}],
        },
    }
    metadata = {
        "shape": described["shape"],
        "data_type": described["dtype"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": described["shard"]}},
        "codecs": [codec],
        "fill_value": 0,
    }
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore.folder(url),
        "metadata": metadata,
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": "open",  # shards never change
    }
    if indices and storage.is_remote(url):
        spec["metadata_cache_pool"] = kvstore.INDICES
    try:
        with waiting(url):
            return kvstore.result(ts.open(spec, context=kvstore.context(), open=True, create=create))
    except ValueError as error:
        if is_refusal(error) or (create and not storage.exists(f"{url}/zarr.json")):
            raise explained(error, url, "write" if create else "read") from error
        raise EyasError(
            f"the array {url} cannot be opened as {described['dtype']} {described['shape']}, which the "
            f"manifest says it is: {reason(error)}; one of the two was edited or cut off: restore it"
        ) from error


def runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(place, start, stop) of every stretch of consecutive numbers: rows[place + i] = start + i < stop."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    for place, end in itertools.pairwise(edges):
        if end > place:
            yield place, int(rows[place]), int(rows[place]) + end - place


def read_rows(arrays: dict[str, ts.TensorStore], rows: np.ndarray) -> dict[str, np.ndarray]:
    """{name: array[rows]}; every request is in flight at once, consecutive rows share one.

    `rows` int64 [n], in any order, repeats allowed. Raises as `read_each` does.
    """
    return read_each({name: (array, rows) for name, array in arrays.items()})


def read_each(wanted: dict[str, tuple[ts.TensorStore, np.ndarray]]) -> dict[str, np.ndarray]:
    """{name: array[rows]} of {name: (array, rows)}, all at once.

    DamagedError naming the array and the rows that are missing or damaged, another EyasError if a server
    refuses or does not answer.
    """
    found, pending = {}, []
    for name, (array, rows) in wanted.items():
        found[name] = np.empty((len(rows), *array.shape[1:]), array.dtype.numpy_dtype)
        target = ts.array(found[name])
        for place, start, stop in runs(rows):
            _require_no_device(array, start, stop)
            request = target[place : place + stop - start].write(array[start:stop])
            pending.append((name, start, stop, request))
    for name, start, stop, request in pending:
        array, _ = wanted[name]
        place = kvstore.place(array.kvstore)
        try:
            with waiting(place):
                kvstore.result(request.commit)
        except ValueError as error:
            if is_refusal(error):
                raise explained(error, place) from error
            _refuse(name, array, range(start, stop), error)
    return found


def _require_no_device(array: ts.TensorStore, start: int, stop: int) -> None:
    """EyasError if a pipe lies where a shard of these rows should: TensorStore would wait for its writer."""
    folder = kvstore.place(array.kvstore)
    if storage.is_remote(folder):
        return
    size, *rest = array.chunk_layout.write_chunk.shape
    shards = [range(start // size, -(-stop // size))]
    shards += [range(-(-n // part)) for n, part in zip(array.shape[1:], rest, strict=True)]
    for shard in itertools.product(*shards):
        storage.require_no_device(f"{folder}c/{'/'.join(map(str, shard))}")


def _refuse(name: str, array: ts.TensorStore, rows: range, error: ValueError) -> None:
    """Finds which rows of a failed request are unreadable, and raises DamagedError."""
    bad, requests = [], [(row, array[row].read()) for row in rows]
    for row, request in requests:
        try:
            kvstore.result(request)
        except ValueError as found:
            bad, error = [*bad, row], found
    named = f"row {rows[0]}" if len(rows) == 1 else f"rows {some(bad or list(rows))}"
    raise DamagedError(f"{name} {named}: missing or damaged on disk ({reason(error)})") from error


def some(rows: list[int]) -> str:
    """The rows, or the first of many and how many they are."""
    return str(rows) if len(rows) <= _NAMED else f"{rows[:_NAMED]} and {len(rows) - _NAMED:,} more"


def row_sums(array: np.ndarray) -> list[int]:
    """The crc32c of every row's raw bytes."""
    raw = np.ascontiguousarray(array).reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)
    return [google_crc32c.value(row) for row in raw]


def crc32(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the raw bytes, as `zlib` and `gzip` compute it; `before` is that of the bytes in front."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)
