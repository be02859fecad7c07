"""The file of answers: a line a conversation, added when it has its outcome, each written once and whole.

A line is {"id", "number", "outcome", "tokens", "reason", "messages", "tools"}, its messages OpenAI's, with
the finish reason of each answer. A conversation without an answer ends with its question, so that `prepare`
leaves it out. When all are there, the lines are put in the order of their numbers: the same answers are the
same bytes.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field

from common import schema, storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import Progress, note
from common.schema import Count, TypedDict
from dump.clean import repaired
from pipelines.regenerate.answerer import Messages
from pipelines.regenerate.talk import Talk

_NONE = -1


class _Line(TypedDict):
    number: Count
    outcome: Annotated[str, Field(pattern="^[a-z]{1,20}$")]
    tokens: Count
    id: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]


class Answers:
    """The lines of `total` conversations. `outcomes` counts them, `tokens` are those generated."""

    def __init__(
        self, path: str, total: int, is_asked: Callable[[int, str, Messages], bool], check: Callable[[], None]
    ) -> None:
        """Reads what is there, without a torn last line; EyasError for lines that are none of ours.

        `is_asked(number, id, messages)`: whether the conversation of that number is that one; `check` raises
        if the file is no longer this process's alone.
        """
        self._path, self._is_asked, self._check = path, is_asked, check
        self._starts, self._sizes = (array("q", [_NONE]) * total for _ in range(2))
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        with library_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._end = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        return self.outcomes.total()

    def is_there(self, number: int) -> bool:
        """Whether the conversation has its line."""
        return self._starts[number] != _NONE

    def add(self, talk: Talk, outcome: str) -> None:
        """Adds a line; MachineError, and the file as before, if there is no room."""
        text = json.dumps(talk.record(outcome), ensure_ascii=False, allow_nan=False)
        line = repaired(text).encode() + b"\n"
        with library_errors(self._path):
            try:
                _write(self._file, line, self._end)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise
        self._count({"number": talk.number, "outcome": outcome, "tokens": talk.tokens}, len(line))

    def sync(self) -> None:
        """What was added is on disk, under its name: EyasError if the file was removed or replaced."""
        self._check()
        with library_errors(self._path):
            os.fsync(self._file)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                    return
        raise EyasError(f"{self._path} was removed or replaced while answers came; run the command again")

    def finish(self) -> None:
        """Puts the lines in order, in a new file that takes the place of this one."""
        starts = np.frombuffer(self._starts, np.int64)
        if (np.diff(starts) > 0).all():
            return
        places = zip(self._sizes, self._starts, strict=True)
        storage.write_pieces(self._path, (os.pread(self._file, *place) for place in places))

    def _read(self) -> int:
        """Notes every line; returns where the next one goes."""
        size = os.fstat(self._file).st_size
        end = number = 0
        with open(self._path, "rb") as file, Progress("read answers", size, "B") as bar:
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    note(f"{self._path}: line {number} was torn and is asked again")
                    os.ftruncate(self._file, end)
                    break
                self._end = end
                self._count(self._checked(data, number), len(data))
                end += len(data)
                bar.update(len(data))
        return end

    def _checked(self, data: bytes, number: int) -> dict[str, Any]:
        where, advice = f"{self._path}, line {number}", "restore the file, or name another one"
        try:
            line = json.loads(data.decode())  # of bytes json would take a mark in front, or another encoding
        except (ValueError, RecursionError):
            raise EyasError(f"{where} is not JSON; {advice}") from None
        schema.check(_Line, line, where, advice)
        if line["number"] >= len(self._starts):
            raise EyasError(f"{where}: there is no conversation {line['number']} in the data; {advice}")
        if self.is_there(line["number"]):
            raise EyasError(f"{where}: conversation {line['number']} is there already; {advice}")
        if not self._is_asked(line["number"], line["id"], line["messages"]):
            raise EyasError(f"{where} is not of conversation {line['number']} of the data; {advice}")
        return line

    def _count(self, line: dict[str, Any], size: int) -> None:
        self._starts[line["number"]], self._sizes[line["number"]] = self._end, size
        self._end += size
        self.outcomes[line["outcome"]] += 1
        self.tokens += line["tokens"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _write(file: int, data: bytes, start: int) -> None:
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written
