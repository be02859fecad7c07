"""Rows of arrays through a cache on a local disk: what is there and whole is not asked for again.

An entry is what a store reads at once: a row of states, or some rows of an array whose rows are small.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from common import zarr
from common.row_cache import RowCache

Good = Callable[[str, np.ndarray, np.ndarray], np.ndarray]


class Source(NamedTuple):
    """An array, and how many neighbouring rows of it are an entry."""

    array: ts.TensorStore
    together: int


def read_rows(
    cache: RowCache, prefix: str, sources: dict[str, Source], rows: np.ndarray, good: Good
) -> dict[str, np.ndarray]:
    """{name: array[rows]}; `prefix` is the keys' of the store.

    `good(name, rows, values)` says of which rows the values are what was written, bool [n]. An entry that is
    not good is read anew from the array, and what is not good there is returned and not kept.
    """
    found, lost = {}, {}
    for name, source in sources.items():
        found[name] = _empty(source.array, len(rows))
        entries = np.unique(rows // source.together).tolist()
        missing = [n for n in entries if not _take(cache, prefix, name, source, n, rows, found[name], good)]
        if missing:
            lost[name] = missing
    read = zarr.read_each(
        {
            name: (sources[name].array, np.concatenate([_rows_of(sources[name], n) for n in missing]))
            for name, missing in lost.items()
        }
    )
    for name, missing in lost.items():
        at = 0
        for number in missing:
            own = _rows_of(sources[name], number)
            values = read[name][at : at + len(own)]
            at += len(own)
            _put(found[name], rows, own, values)
            if good(name, own, values).all():
                cache.write(_key(prefix, name, number), _bytes(values))
    return found


def _take(
    cache: RowCache,
    prefix: str,
    name: str,
    source: Source,
    number: int,
    rows: np.ndarray,
    found: np.ndarray,
    good: Good,
) -> bool:
    """Fills `found` with what it needs of an entry; False if there is none, or it is not what was written."""
    own, key = _rows_of(source, number), _key(prefix, name, number)
    values = _empty(source.array, len(own))
    if not cache.read_into(key, _bytes(values)):
        return False
    if not good(name, own, values).all():
        cache.drop(key)
        return False
    _put(found, rows, own, values)
    return True


def _empty(array: ts.TensorStore, rows: int) -> np.ndarray:
    return np.empty((rows, *array.shape[1:]), array.dtype.numpy_dtype)


def _rows_of(source: Source, number: int) -> np.ndarray:
    start = number * source.together
    return np.arange(start, min(start + source.together, source.array.shape[0]))


def _put(found: np.ndarray, rows: np.ndarray, own: np.ndarray, values: np.ndarray) -> None:
    (at,) = np.nonzero((rows >= own[0]) & (rows <= own[-1]))
    found[at] = values[rows[at] - own[0]]


def _key(prefix: str, name: str, number: int) -> str:
    return f"{prefix}/{name}/{number // 1000}/{number}"


def _bytes(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
