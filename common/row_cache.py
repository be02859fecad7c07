"""A folder of a local disk that keeps what was read from afar, bounded and shared by any number of processes.

Entries lie in its folder `eyas-cache`; nothing else in it is looked at. An entry is a file that appears by
rename. It is not flushed to the disk, and nothing here trusts it: whoever reads compares it with the checksum
that its store has, and drops it if it is another. The bytes of all entries are counted in `.used` under a
lock, before they are written; when there is no room, those go that were not read for the longest time.
"""

import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from common import storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import note
from common.storage import PARTIAL

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_MOST, _DIGITS = 1e18, 20  # bytes, and how many digits they are written with
_FREED = 0.05  # of the limit, at once: looking through all entries takes seconds where there are a million
_ABANDONED = 3600.0  # seconds after which a file that is being written is nobody's
_USED = ".used"
_ENTRIES = "eyas-cache"


def parse(text: str) -> tuple[str, int]:
    """(folder, bytes) of FOLDER:SIZE, such as /mnt/ssd:200GB. EyasError if it is something else."""
    folder, _, size = text.rpartition(":")
    found = _SIZE.fullmatch(size.strip())
    if not folder or not found:
        raise EyasError(f"cache={text!r} must be FOLDER:SIZE, such as /mnt/ssd:200GB")
    limit = float(found[1]) * _UNITS[found[2].upper()]
    if storage.is_remote(folder) or not 1 <= limit < _MOST:
        raise EyasError(f"cache={text!r} must be a folder of this machine, and a size that a disk can have")
    return folder, int(limit)


class RowCache:
    """Entries of bytes by key, a path of plain names; safe to use from several threads and processes."""

    def __init__(self, folder: str, limit: int):
        """EyasError if the folder cannot be written, or its disk has too little room for `limit` bytes."""
        folder = storage.join(folder, _ENTRIES)
        storage.require_folder(folder)
        self._folder, self._limit = storage.local_path(folder), limit
        with library_errors(folder):
            os.makedirs(self._folder, exist_ok=True)
            with self._counted() as used:
                kept = used[0]
        what, advice = "the entries of the cache", "give it a smaller size or another folder"
        storage.require_room(folder, limit - kept, what, advice)
        self._writes = True

    def _path(self, key: str) -> str:
        return storage.join(self._folder, key)

    def read_into(self, key: str, buffer: memoryview) -> bool:
        """Fills `buffer` with the entry; False, and it holds anything, if there is none of its size."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0, opener=_opened) as file:
                about = os.fstat(file.fileno())
                if stat.S_ISREG(about.st_mode) and about.st_size == len(buffer) and _filled(file, buffer):
                    os.utime(path)
                    return True
        except FileNotFoundError:
            return False
        except OSError:  # an entry that the disk cannot read, or a link
            pass
        self.drop(key)
        return False

    def read(self, key: str) -> bytes | None:
        """The entry; None if there is none."""
        try:
            size = os.path.getsize(self._path(key))
        except OSError:
            return None
        if size > self._limit:  # which no entry is; the memory may not have so much
            self.drop(key)
            return None
        buffer = bytearray(size)
        return bytes(buffer) if self.read_into(key, memoryview(buffer)) else None

    def drop(self, key: str) -> None:
        """Removes an entry, which is damaged."""
        with suppress(OSError):
            os.unlink(self._path(key))

    def write(self, key: str, data: memoryview | bytes) -> None:
        """Keeps an entry, if it fits. Where the disk is full or fails, that is said, and no more is kept."""
        path = self._path(key)
        if not self._writes or len(data) > self._limit or os.path.exists(path):
            return
        partial = f"{path}.{os.getpid()}.{threading.get_ident()}{PARTIAL}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with self._begun(partial, len(data)) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            os.replace(partial, path)
        except FileNotFoundError:  # somebody empties the folder, which may go on
            return
        except OSError as error:
            self._writes = False
            note(f"the cache {self._folder} keeps no more: {error.strerror or error}")
            with suppress(OSError):
                os.unlink(partial)

    @contextmanager
    def _counted(self) -> Iterator[list[int]]:
        """[bytes in use], to be changed; only one process at a time is in here."""
        path = os.path.join(self._folder, _USED)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            text = os.pread(handle, 2 * _DIGITS, 0)
            is_whole = len(text) == _DIGITS and text.isdigit()  # a part of it would be another number
            used = [int(text) if is_whole else self._free(self._limit)]
            before = used[0] if is_whole else None
            yield used
            if used[0] != before:
                os.ftruncate(handle, os.pwrite(handle, b"%0*d" % (_DIGITS, used[0]), 0))
        finally:
            os.close(handle)

    def _begun(self, path: str, size: int) -> BinaryIO:
        """A new file of that size, to be written: whoever counts meanwhile counts it whole."""
        with self._counted() as used:
            if used[0] + size > self._limit:
                used[0] = self._free(max(0, int(self._limit * (1 - _FREED)) - size))
            file = open(path, "wb", buffering=0)  # noqa: SIM115 (the caller closes it)
            os.truncate(file.fileno(), size)
            used[0] += size
        return file

    def _free(self, wanted: int) -> int:
        """Removes the entries that were not read for the longest time, until at most `wanted` bytes are left;
        the bytes that are."""
        found, total, now = [], 0, time.time()
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                with suppress(OSError):  # another process has removed it
                    about = os.stat(path)
                    if name.endswith(PARTIAL) and now - about.st_mtime > _ABANDONED:
                        os.unlink(path)
                    elif name != _USED:
                        found.append((about.st_mtime_ns, about.st_size, path))
                        total += about.st_size
        for _, size, path in sorted(found):
            if total <= wanted:
                break
            if not path.endswith(PARTIAL):
                with suppress(OSError):
                    os.unlink(path)
                    total -= size
        return total


def _opened(path: str, flags: int) -> int:
    """No link to what is elsewhere, and no waiting for a pipe's writer."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _filled(file, buffer: memoryview) -> bool:
    at = 0
    while at < len(buffer):
        read = file.readinto(buffer[at:])
        if not read:
            return False
        at += read
    return True
