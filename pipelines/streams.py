"""stdout and stderr that are always there, and that never end a stage because nobody reads them.

A pager is left, `tee` dies, a job runner closes them: the work goes on, and what nobody reads is dropped.
"""

import io
import os
import sys


class _Unread(io.FileIO):
    """A stream that drops what its reader no longer takes; of stderr, whatever cannot be written."""

    def write(self, data: bytes) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() != 2:
                raise  # a result is lost: the disk is full
            return len(data)


def secure() -> None:
    """Call it before a file is opened: one that got the number of a closed stream would be written into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout, sys.stderr = _open(1, sys.stdout), _open(2, sys.stderr)


def _open(number: int, old: io.TextIOWrapper | None) -> io.TextIOWrapper:
    encoding, errors = (old.encoding, old.errors) if old else ("utf-8", "backslashreplace")
    lines = number == 2 or os.isatty(number)
    return io.TextIOWrapper(
        io.BufferedWriter(_Unread(number, "w", closefd=False)), encoding, errors, line_buffering=lines
    )
