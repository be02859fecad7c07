"""Records of a JSON file: of a list, of lines, of values behind each other, of a list inside an object.

Memory stays at one value and one piece of the file. The parser is Python's own, fed piece by piece. ijson 3.6
(yajl2_c) takes 0.21 s for a list of 125 MB where this takes 0.28 s, but it ends at bytes that are no UTF-8,
puts `?` for a lone surrogate without a word, cannot tell at which byte a record begins, and takes memory by
the square of the depth: 1 GB for a line of 20,000 brackets.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from common.errors import EyasError
from common.progress import note
from dump.record_shapes import unwrapped

_PIECE = 4 << 20  # bytes a read
_LARGEST = 256 << 20  # characters of one value
_SEPARATORS = re.compile(r"[\s,]*")


class Source(Protocol):
    """What reading tells about a file."""

    url: str
    bytes: int
    lines: int
    bad_lines: int
    first_bad_line: int
    cut_off: bool


def is_lines(head: bytes, whole: bool) -> bool:
    """Whether a file that begins with `head` is read line by line: one of its first two lines is JSON.

    `whole`: the file ends there.
    """
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    lines = head.split(b"\n", 2)
    lines = [line.strip() for line in (lines if whole or len(lines) == 3 else lines[:-1])[:2]]
    if lines and _is_value(lines[0]):
        return True
    return len(lines) > 1 and not lines[0].startswith(b"[") and _is_value(lines[1])


def _is_value(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def read_lines(source: Source, file: BinaryIO) -> Iterator[Any]:
    """The records of lines; lines that are not JSON are skipped and counted."""
    for number, line in enumerate(file, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        source.lines += 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            source.bad_lines += 1
            source.first_bad_line = source.first_bad_line or number
            continue
        yield from unwrapped(value)


def read_values(source: Source, file: BinaryIO) -> Iterator[Any]:
    """The records of a list, or of values behind each other. EyasError where the file cannot be read on.

    A file that ends in the middle of a value gives the values before it and a warning.
    """
    text = _Text(file)
    text.skip_separators()
    if not text.text.startswith(("[", "{"), text.at):
        if not text.at < len(text.text):
            return
        raise EyasError(f"{source.url} is no list of conversations: expected UTF-8 that begins with [ or {{")
    decoder, count, inside = json.JSONDecoder(), 0, False
    while True:
        text.skip_separators()
        if text.text.startswith("]" if inside else "[", text.at):
            text.at, inside = text.at + 1, not inside
            continue
        if not inside and text.at == len(text.text):
            return
        try:
            value, text.at = decoder.raw_decode(text.text, text.at)
        except RecursionError:
            raise EyasError(f"{source.url}: record {count + 1} is nested too deeply") from None
        except ValueError as error:  # also a number of more digits than Python reads
            where = f"record {count + 1}, which begins at byte {text.byte()}"
            if not _may_go_on(error, text):
                reason = getattr(error, "msg", "a number is too long")
                raise EyasError(f"{source.url}: {where}, is not JSON ({reason})") from None
            if len(text.text) - text.at > _LARGEST:
                raise EyasError(
                    f"{source.url}: {where}, has more than {_LARGEST >> 20} million characters; write one "
                    "conversation a line, or a list of them"
                ) from None
            if text.more():
                continue
            source.cut_off = True
            note(
                f"warning: {source.url} is cut off at byte {text.read}, inside the record that begins at "
                f"byte {text.byte()}; the {count:,} whole records before it are used"
            )
            return
        for record in unwrapped(value):
            count += 1
            yield record


def _may_go_on(error: ValueError, text: "_Text") -> bool:
    """True if the error can come from the text's end: a string left open, or a fault at the very end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 12


class _Text:
    """The unread text of a UTF-8 file; knows at which byte of the file the next character is.

    `read`: bytes read so far.
    """

    def __init__(self, file: BinaryIO):
        self.text, self.at, self.read = "", 0, 0
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode

    def more(self) -> bool:
        """Appends the next piece, at least as much as is pending; False at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self._decode(piece, final=not piece), 0
        self.read += len(piece)
        if self.read == len(piece) and self.text.startswith("\ufeff"):
            self.at = 1
        return bool(piece)

    def skip_separators(self) -> None:
        """Moves to the next character that is neither white space nor a comma."""
        while True:
            self.at = _SEPARATORS.match(self.text, self.at).end()
            if self.at < len(self.text) or not self.more():
                return

    def byte(self) -> int:
        """The offset of the next character in the file."""
        return self.read - len(self.text[self.at :].encode("utf-8", "surrogateescape"))
