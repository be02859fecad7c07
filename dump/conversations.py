"""Conversations are read record by record from JSON, JSONL, Parquet and Arrow files, by path or URL.

A record is whatever the file holds (dump/record_shapes.py lists the shapes); dump/clean.py judges it. Memory
stays at one record and one piece of the file. Messages name files, lines and bytes, never text: conversations
are personal data.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.errors import EyasError, RestartError
from common.texts import is_unicode
from dump.data_files import JSON_KINDS, Advance, kind_of, name_of, opened, version
from dump.json_records import is_lines, read_lines, read_values
from dump.table_records import read_arrow, read_parquet

_PIECE = 1 << 20  # bytes a read
_HEAD = 1 << 20  # bytes looked at to tell lines from a list
_BAD_LINES = 0.01  # a file with this share of lines that are not JSON is refused


def _silent(read: int) -> None:
    """No progress is shown."""


@dataclass
class DataFile:
    """One data file: its identity, and what reading it has met so far."""

    url: str
    name: str
    bytes: int
    sha256: str
    version: dict[str, Any]
    lines: int = 0
    bad_lines: int = 0
    first_bad_line: int = 0
    cut_off: bool = False

    @classmethod
    def open(cls, url: str, advance: Advance = _silent) -> "DataFile":
        """Reads the file once for its sha256. EyasError if it is missing, empty, of an unknown kind, or has a
        name that is no text."""
        kind_of(url)
        if not is_unicode(url):
            raise EyasError(f"the name of the data file {url!a} is not UTF-8; rename it")
        digest, size, found = hashlib.sha256(), 0, version(url)
        with opened(url) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                advance(len(piece))
        if size == 0:
            raise EyasError(f"{url} is empty; expected conversations")
        return cls(url, name_of(url), size, digest.hexdigest(), found)

    def identity(self) -> dict[str, Any]:
        """What the manifest says of the file: no folder, so that the same data gives the same manifest."""
        return {"name": self.name, "sha256": self.sha256, "bytes": self.bytes}

    def records(self, advance: Advance = _silent) -> Iterator[Any]:
        """The value of every record, in the file's order. EyasError where the file cannot be read on.

        A JSON file that ends in the middle of a record gives the whole records before it and a warning.
        """
        kind = kind_of(self.url)
        if kind in JSON_KINDS:
            with opened(self.url, _silent) as file:
                head = file.read(_HEAD)
            read = read_lines if is_lines(head, whole=len(head) < _HEAD) else read_values
            del head
            with opened(self.url, advance) as file:
                yield from read(self, file)
            return
        with opened(self.url) as file:
            for rows, share in (read_parquet if kind == ".parquet" else read_arrow)(self.url, file):
                yield from rows
                advance(int(self.bytes * share))

    def require_same(self) -> None:
        """RestartError if the file is no longer the one whose sha256 is known."""
        if version(self.url) != self.version:
            raise RestartError(
                f"{self.url} was changed while it was read; run the same command again when nobody writes it"
            )

    def require_json(self) -> None:
        """EyasError if 1% or more of the lines read so far were not JSON."""
        if self.bad_lines and self.bad_lines >= _BAD_LINES * self.lines:
            raise EyasError(
                f"{self.url}: {self.bad_lines} of {self.lines} lines are not JSON, the first is line "
                f"{self.first_bad_line}; fewer than 1% are skipped, so repair the file"
            )
