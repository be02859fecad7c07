"""Tokens, masks and names of conversations wait on disk until their rows are known; memory holds numbers.

The files have no name: whatever ends the process, the system frees their room. They lie on the disk of a
local store, and in the system's folder for temporary files (`TMPDIR`) where the store is remote. They are
read by `pread`: what is mapped into memory would count as the process's own.
"""

import os
import tempfile
from array import array
from contextlib import suppress
from types import TracebackType
from typing import Self

import numpy as np

from common import storage
from common.library_errors import library_errors
from dump.encode import Encodings

_BUFFER = 1 << 20
TOKEN_BYTES = 5  # an int32 token and its mask


class Spill:
    """n conversations, added in order. Use as a context manager, which frees the files.

    `lengths` int32 [n] tokens that are kept, `counted` int32 [n] of them, `read` int32 [n] tokens before the
    cut, `draws` uint64 [n], `sources` int32 [n] of dump/clean.py; `largest` token of all.
    """

    def __init__(self, store: str) -> None:
        """MachineError if no file can be made there."""
        self.folder = tempfile.gettempdir() if storage.is_remote(store) else _nearest(store)
        with library_errors(self.folder):
            self._files = {
                name: tempfile.TemporaryFile(dir=self.folder, buffering=_BUFFER)  # noqa: SIM115
                for name in ("tokens", "mask", "ids")
            }
        self._lengths, self._counted, self._read = array("i"), array("i"), array("i")
        self._draws, self._id_ends = array("Q"), array("q", [0])
        self._sources = array("i")
        self.largest = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, found: Encodings, ids: list[str], draws: list[int], sources: list[int]) -> None:
        """Appends conversations; MachineError if the disk is full."""
        with library_errors(self.folder):
            self._files["tokens"].write(found.tokens.tobytes())
            self._files["mask"].write(found.mask.tobytes())
            for text in ids:
                self._id_ends.append(self._id_ends[-1] + self._files["ids"].write(text.encode()))
        for mine, given in (
            (self._lengths, found.lengths),
            (self._counted, found.counted),
            (self._read, found.read),
        ):
            mine.frombytes(given.tobytes())
        self._draws.extend(draws)
        self._sources.extend(sources)
        self.largest = max(self.largest, int(found.tokens.max(initial=0)))

    def finish(self) -> None:
        """To be called once, behind the last `add`: what follows reads."""
        with library_errors(self.folder):
            for file in self._files.values():
                file.flush()
        self.lengths, self.counted, self.read, self.sources = (
            np.frombuffer(of, np.int32) for of in (self._lengths, self._counted, self._read, self._sources)
        )
        self.draws = np.frombuffer(self._draws, np.uint64)
        self._starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def id(self, item: int) -> str:
        """The id of a conversation."""
        start, stop = self._id_ends[item], self._id_ends[item + 1]
        return os.pread(self._files["ids"].fileno(), stop - start, start).decode()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The tokens of conversations start to stop - 1, one behind the other."""
        return self._read_numbers("tokens", np.int32, start, stop)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Their masks, uint8."""
        return self._read_numbers("mask", np.uint8, start, stop)

    def copy(self, name: str, items: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Puts the "tokens" or "mask" of each of some conversations into the flat `out`, at its place."""
        file, data, width = self._files[name].fileno(), memoryview(out).cast("B"), out.itemsize
        numbers = (width * x for x in (self._starts[items], places, places + self.lengths[items]))
        with library_errors(self.folder, "read"):
            for start, begin, end in zip(*(x.tolist() for x in numbers), strict=True):
                read = os.preadv(file, [data[begin:end]], start)
                assert read == end - begin, (read, end - begin)

    def _read_numbers(self, name: str, kind: type, start: int, stop: int) -> np.ndarray:
        first, last = (int(place) * np.dtype(kind).itemsize for place in self._starts[[start, stop]])
        with library_errors(self.folder, "read"):
            return np.frombuffer(os.pread(self._files[name].fileno(), last - first, first), kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            with suppress(OSError):  # of what the disk had no room for
                file.close()


def _nearest(store: str) -> str:
    """The nearest folder that is there, at or above the store's own."""
    place = os.path.abspath(storage.local_path(store))
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place
