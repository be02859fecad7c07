"""The sources that `--data` names, some files each, are read one by one; how much of each is used."""

import math
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from common.errors import EyasError
from common.progress import Progress
from dump.clean import Cleaner, Conversation
from dump.conversations import DataFile
from dump.data_files import Advance, find_files


class Sources:
    """The files of each source, opened: their sums are known."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        """EyasError for a path that names no data file, or one that cannot be read."""
        urls = [find_files((path,)) for path in paths]
        with Progress("check data", None, "B") as bar:
            self._of_each = [[DataFile.open(url, bar.update) for url in of] for of in urls]
        self._paths = paths
        self.files = [file for files in self._of_each for file in files]
        self.bytes = sum(file.bytes for file in self.files)

    def conversations(
        self, cleaner: Cleaner, advance: Advance, total: float, limits: list[float] | None = None
    ) -> Iterator[Conversation]:
        """The cleaned conversations: at most `total`, and `limits` of each source. `source` of each is the
        number of its file. EyasError where a file cannot be read on."""
        first = 0
        for files, limit in zip(self._of_each, limits or [math.inf] * len(self._of_each), strict=True):
            with closing(_read(files, first, cleaner, advance, min(limit, total))) as found:
                for conversation in found:
                    total -= 1
                    yield conversation
            first += len(files)
            if not total:
                return

    def mixed(self, file: np.ndarray, mix: tuple[float, ...], total: float) -> np.ndarray:
        """Which of n conversations are used, int64, ascending: the first ones of each source, as many as
        `mix` gives it where nothing is left of the scarcest, or `total` are reached; one of each at least.
        `file` int [n]: which each was read from.

        EyasError for a source without conversations.
        """
        source = np.repeat(np.arange(len(mix)), [len(files) for files in self._of_each])[file]
        found, parts = np.bincount(source, minlength=len(mix)), np.array(mix)
        if not found.all():
            empty = self._paths[int(np.argmin(found))]
            raise EyasError(f"{empty} has no conversation that can be used: nothing to mix; leave it out")
        scale = min((found / parts).min(), total / parts.sum())
        most = np.maximum(1, np.floor(scale * parts + 1e-6).astype(np.int64))
        while most.sum() > total:
            most[most.argmax()] -= 1
        return np.sort(np.concatenate([np.flatnonzero(source == i)[:n] for i, n in enumerate(most)]))


def limits(
    sources: int, take: tuple[int, ...] | None, mix: tuple[float, ...] | None, total: float
) -> list[float]:
    """How many conversations of each source to read: `take`, and no more than a mix of `total` needs."""
    most = list(take or [math.inf] * sources)
    if mix is None or total == math.inf:
        return most
    shares = [math.ceil(total * part / sum(mix)) for part in mix]
    return [min(pair) for pair in zip(most, shares, strict=True)]


def _read(
    files: list[DataFile], first: int, cleaner: Cleaner, advance: Advance, most: float
) -> Iterator[Conversation]:
    """At most so many conversations of files that are numbered from `first`."""
    taken = 0
    for number, file in enumerate(files, first):
        with closing(file.records(advance)) as records:
            for place, record in enumerate(records):
                conversation = cleaner.clean(record, place, file.name, number)
                if conversation is not None:
                    yield conversation
                    taken += 1
                if taken == most:
                    break
        file.require_json()
        file.require_same()
        if taken == most:
            return
