"""The rows of a store, made from packed conversations a few at a time, and the index of conversations.

Legend: R rows, T tokens a row, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from common.manifest import COLUMNS
from dump.pack import Packed
from dump.spill import Spill

TRAIN, TEST = "train", "test"
ROW_TOKEN_BYTES = sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values())
_LINES = 1 << 18  # of the index made at once
_PIECE = 1 << 20  # tokens handled at once
_INDEX = pa.schema(
    {"id": pa.string(), "split": pa.string()}
    | {name: pa.int32() for name in ("row", "start", "length", "counted", "source")}
)


class Column:
    """A column of the rows, [R, T]: `column[start:stop]` makes some of them.

    A row's segments count from 1 in its order and positions restart in each; 0 is padding.
    """

    def __init__(self, name: str, spill: Spill, packed: Packed, T: int):
        self._name, self._spill, self._packed, self._T = name, spill, packed, T

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = np.zeros((rows.stop - rows.start, self._T), COLUMNS[self._name])
        step = max(1, _PIECE // self._T)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            self._fill(start, stop, found[start - rows.start : stop - rows.start])
        return found

    def _fill(self, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start to stop - 1 into `out`, which is zeros."""
        items, row, begin, length = _places(self._spill, self._packed, start, stop)
        if self._name in ("tokens", "loss_mask"):
            source = "mask" if self._name == "loss_mask" else "tokens"
            self._spill.copy(source, items, out.reshape(-1), (row - start) * self._T + begin)
            return
        # What follows treats a row's padding as one more conversation behind the others.
        first = self._packed.first[start : stop + 1] - self._packed.first[start]
        padding = self._T - np.add.reduceat(length, first[:-1])
        sizes = np.insert(length, first[1:], padding)
        number = np.arange(1, len(items) + 1) - np.repeat(first[:-1], np.diff(first))
        segment = np.repeat(np.insert(number, first[1:], 0).astype(np.int32), sizes)
        if self._name == "segment_ids":
            out[:] = segment.reshape(out.shape)
            return
        begins = (np.cumsum(sizes) - sizes).astype(np.int32)
        position = np.arange(out.size, dtype=np.int32) - np.repeat(begins, sizes)
        out[:] = (position * (segment > 0)).reshape(out.shape)


def columns(spill: Spill, packed: Packed, T: int) -> dict[str, Column]:
    """All columns of the rows."""
    return {name: Column(name, spill, packed, T) for name in COLUMNS}


def _places(spill: Spill, packed: Packed, start: int, stop: int) -> tuple[np.ndarray, ...]:
    """(items, row, first token in the row, length) of the conversations in rows start to stop - 1."""
    edges = packed.first[start : stop + 1]
    items = packed.items[edges[0] : edges[-1]]
    sizes, length = np.diff(edges), spill.lengths[items].astype(np.int64)
    row = np.repeat(np.arange(start, stop), sizes)
    before = np.cumsum(length) - length  # tokens in front, since the first of these rows
    return items, row, before - np.repeat(before[edges[:-1] - edges[0]], sizes), length


def index(spill: Spill, packed: Packed) -> pa.RecordBatchReader:
    """A line a conversation, in the order of the rows, made a row group at a time.

    `source`: which of the manifest's `data` it was read from, from 0.
    """
    return pa.RecordBatchReader.from_batches(_INDEX, _lines(spill, packed))


def _lines(spill: Spill, packed: Packed) -> Iterator[pa.RecordBatch]:
    start = 0
    while start < packed.rows:
        end = int(np.searchsorted(packed.first, packed.first[start] + _LINES, side="right")) - 1
        stop = max(start + 1, min(end, packed.rows))
        items, row, begin, length = _places(spill, packed, start, stop)
        ids = pa.array([spill.id(item) for item in items.tolist()], pa.string())
        split = pa.array(np.where(row < packed.train_rows, TRAIN, TEST), pa.string())
        of_items = (spill.counted[items], spill.sources[items])
        numbers = [pa.array(x.astype(np.int32)) for x in (row, begin, length, *of_items)]
        yield pa.record_batch([ids, split, *numbers], schema=_INDEX)
        start = stop


def token_counts(spill: Spill, learnt: np.ndarray, V: int) -> np.ndarray:
    """How often each token is counted in the conversations that are `learnt` (bool [n]), int64 [V]."""
    counts, start = np.zeros(V, np.int64), 0
    ends = np.cumsum(spill.lengths, dtype=np.int64)
    while start < len(spill):
        before = ends[start] - spill.lengths[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + _PIECE, side="right")))
        kept = np.repeat(learnt[start:stop], spill.lengths[start:stop]) & (spill.mask(start, stop) == 1)
        counts += np.bincount(spill.tokens(start, stop)[kept], minlength=V)
        start = stop
    return counts
