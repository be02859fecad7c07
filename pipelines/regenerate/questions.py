"""The questions of conversations wait on disk, in a file without a name; memory holds a number of each."""

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import Progress, note
from dump.clean import Cleaner, Conversation
from dump.prepare_report import nonzero
from dump.record_shapes import EXPECTED
from dump.sources import Sources
from pipelines.regenerate.answerer import Messages
from pipelines.regenerate.talk import Talk

_BUFFER = 1 << 20


class Questions:
    """Conversations to ask, in the order in which they were read. A context manager, which frees the file."""

    def __init__(self, folder: str) -> None:
        self._folder, self._ends = folder, array("q", [0])
        with library_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=_BUFFER)  # noqa: SIM115

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, sources: Sources, most: float) -> Counter[str]:
        """Adds the conversations of all files, at most so many; returns the counts of dump/clean.py.

        EyasError if none asks anything.
        """
        cleaner = Cleaner(questions=True)
        with Progress("read questions", sources.bytes, "B") as bar:
            for conversation in sources.conversations(cleaner, bar.update, most):
                self._add(conversation)
        with library_errors(self._folder):
            self._file.flush()
        counts = cleaner.counts
        if not len(self):
            names = ", ".join(file.name for file in sources.files)
            reasons = ", ".join(
                f"{n} {name.removeprefix('dropped_')}" for name, n in nonzero(counts, "dropped_")
            )
            first = f"; the first of another shape is {cleaner.malformed}" if cleaner.malformed else ""
            found = f"none of {counts['read']} records asks anything ({reasons}){first}"
            raise EyasError(f"{names}: {found}; expected {EXPECTED}")
        note(f"conversations: {counts['read']:,} read, {len(self):,} to be answered")
        for prefix in ("dropped_", "turns_"):
            if found := nonzero(counts, prefix):
                note("  " + ", ".join(f"{name} {n:,}" for name, n in found))
        return counts

    def talks(self, without: Iterator[bool]) -> Iterator[Talk]:
        """Those for which `without`, an answer for each, says False."""
        for number, is_done in enumerate(without):
            if not is_done:
                yield self._talk(number)

    def _add(self, conversation: Conversation) -> None:
        value = [conversation.id, conversation.messages, conversation.tools]
        with library_errors(self._folder):
            self._ends.append(self._ends[-1] + self._file.write(json.dumps(value).encode()))

    def is_asked(self, number: int, name: str, messages: Messages) -> bool:
        """Whether what was said, answers among it, are the questions of that conversation, or the first ones
        of them."""
        known, asked, _ = self._read(number)
        said = [turn for turn in messages if turn.get("role") != "assistant"]
        return name == known and bool(said) and said == asked[: len(said)]

    def _talk(self, number: int) -> Talk:
        name, messages, tools = self._read(number)
        asked = json.dumps([messages, tools]).encode()
        return Talk(number, name, messages, tools, hashlib.blake2b(asked).digest())

    def _read(self, number: int) -> tuple[str, Messages, list[dict[str, Any]]]:
        """(id, questions, tools)"""
        start, stop = self._ends[number], self._ends[number + 1]
        with library_errors(self._folder, "read"):
            return tuple(json.loads(os.pread(self._file.fileno(), stop - start, start)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # of what the disk had no room for, which was told
            self._file.close()
