"""Conversations are read record by record from JSON, JSONL and Parquet files, by path or URL (fsspec).

A record is whatever the file holds: ShareGPT's `{"id", "conversations": [{"from", "value"}]}` or OpenAI's
`{"id", "messages": [{"role", "content"}]}`; dump/clean.py judges it. Memory stays at one record and one
piece of the file. Messages name files, lines and bytes, never text: conversations are personal data.
"""

import codecs
import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from common import storage
from common.errors import EyasError
from common.progress import note

TURN_KEYS = ("conversations", "messages")
_PIECE = 4 << 20  # bytes a read
_BAD_LINES = 0.01  # a JSONL file with this share of lines that are not JSON is refused
_SEPARATORS = re.compile(r"[\s,]*")

Advance = Callable[[int], None]  # told how many more bytes have been read


@dataclass
class DataFile:
    """One data file: its identity, and what reading it has met so far."""

    url: str
    name: str
    bytes: int
    sha256: str
    lines: int = 0
    bad_lines: int = 0
    first_bad_line: int = 0
    cut_off: bool = False

    @classmethod
    def open(cls, url: str, advance: Advance = lambda read: None) -> "DataFile":
        """Reads the file once for its sha256. EyasError if it is missing, empty or of an unknown kind."""
        name = posixpath.basename(url)
        if posixpath.splitext(name)[1].lower() not in _READERS:
            raise EyasError(f"{url} is of an unknown kind; expected one of {', '.join(_READERS)}")
        digest, size = hashlib.sha256(), 0
        with _opened(url) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                advance(len(piece))
        if size == 0:
            raise EyasError(f"{url} is empty; expected conversations")
        return cls(url, name, size, digest.hexdigest())

    def identity(self) -> dict[str, Any]:
        """What the manifest says of the file: no folder, so that the same data gives the same manifest."""
        return {"name": self.name, "sha256": self.sha256, "bytes": self.bytes}

    def records(self, advance: Advance = lambda read: None) -> Iterator[Any]:
        """The JSON value of every record, in the file's order. EyasError where the file cannot be read on.

        A JSON file that ends in the middle of a record gives the whole records before it and a warning.
        """
        with _opened(self.url) as file:
            yield from _READERS[posixpath.splitext(self.name)[1].lower()](self, file, advance)

    def require_json(self) -> None:
        """EyasError if 1% or more of the lines read so far were not JSON."""
        if self.bad_lines and self.bad_lines >= _BAD_LINES * self.lines:
            raise EyasError(
                f"{self.url}: {self.bad_lines} of {self.lines} lines are not JSON, the first is line "
                f"{self.first_bad_line}; fewer than 1% are skipped, so repair the file"
            )


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    try:
        place = fsspec.open(url if storage.is_remote(url) else storage.local_path(url), "rb")
    except (ImportError, ValueError) as error:  # an unknown protocol, or one whose package is missing
        raise EyasError(f"{url} cannot be read: {error}") from None
    try:
        with place as file:
            yield file
    except FileNotFoundError:
        raise EyasError(f"the data file {url} does not exist; check the path") from None
    except IsADirectoryError:
        raise EyasError(f"{url} is a folder; name the data files in it") from None
    except OSError as error:
        raise EyasError(f"{url} cannot be read: {error}") from None


def _read_json(source: DataFile, file: BinaryIO, advance: Advance) -> Iterator[Any]:
    """The elements of a JSON array; a file of objects instead is read line by line, as many are named so."""
    start = file.read(4096)
    opening = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    if opening == b"{":
        yield from _read_lines(source, file, advance)
        return
    if opening != b"[":
        raise EyasError(f"{source.url} is no list of conversations: expected it to begin with [")
    text = _Text(file, advance)
    text.more()
    text.at = text.text.index("[") + 1
    decoder, count = json.JSONDecoder(), 0
    while True:
        text.skip_separators()
        if text.text.startswith("]", text.at):
            return
        try:
            record, text.at = decoder.raw_decode(text.text, text.at)
        except RecursionError:
            raise EyasError(f"{source.url}: record {count + 1} is nested too deeply") from None
        except ValueError as error:  # also a number of more digits than Python reads
            if not _may_go_on(error, text):
                where = f"record {count + 1}, which begins at byte {text.byte()}"
                reason = getattr(error, "msg", "a number is too long")
                raise EyasError(f"{source.url}: {where}, is not JSON ({reason})") from None
            if text.more():
                continue
            source.cut_off = True
            note(
                f"warning: {source.url} is cut off at byte {source.bytes}, inside the record that begins at "
                f"byte {text.byte()}; the {count:,} whole records before it are used"
            )
            return
        count += 1
        yield record


def _may_go_on(error: ValueError, text: "_Text") -> bool:
    """True if the error can come from the text's end: a string left open, or a fault at the very end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 12


class _Text:
    """The unread text of a UTF-8 file; knows at which byte of the file the next character is."""

    def __init__(self, file: BinaryIO, advance: Advance):
        self.text, self.at = "", 0
        self._file, self._advance = file, advance
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decoded = 0

    def more(self) -> bool:
        """Appends the next piece, at least as much as is pending; False at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self.text) - self.at))
        self._advance(len(piece))
        self.text, self.at = self.text[self.at :] + self._decode(piece, final=not piece), 0
        self._decoded += len(piece)
        return bool(piece)

    def skip_separators(self) -> None:
        """Moves to the next character that is neither white space nor a comma."""
        while True:
            self.at = _SEPARATORS.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return

    def byte(self) -> int:
        """The offset of the next character in the file."""
        return self._decoded - len(self.text[self.at :].encode("utf-8", "surrogateescape"))


def _read_lines(source: DataFile, file: BinaryIO, advance: Advance) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        advance(len(line))
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        source.lines += 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            source.bad_lines += 1
            source.first_bad_line = source.first_bad_line or number
            continue
        yield record


def _read_parquet(source: DataFile, file: BinaryIO, advance: Advance) -> Iterator[Any]:
    try:
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        column = next((name for name in TURN_KEYS if name in schema.names), None)
        if column is None or not _holds_turns(schema.field(column).type):
            raise EyasError(
                f"{source.url} has the columns {', '.join(schema.names) or '(none)'}; expected a list of "
                "structs (from, value) named conversations, or (role, content) named messages"
            )
        columns = [column] + (["id"] if "id" in schema.names else [])
        rows = max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
            advance(source.bytes * batch.num_rows // rows)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise EyasError(f"{source.url} is no whole Parquet file: {reason}") from None


def _holds_turns(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(
        kind.value_type
    ):
        return False
    names = {field.name for field in kind.value_type}
    return {"from", "value"} <= names or {"role", "content"} <= names


_READERS = {".json": _read_json, ".jsonl": _read_lines, ".parquet": _read_parquet}
