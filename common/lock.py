"""One process at a time works in a folder: of a disk by a lock of the system, of a bucket by a lease."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common import lease, storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import note

FILE = ".lock"  # stays when the lock is released: removing it would let two processes lock two files
_GLANCES, _GLANCE = 5, 0.02  # how often, and for how many seconds, a look at the lock is waited for
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(folder: str) -> Iterator[Callable[[], None]]:
    """Holds the lock of `folder`, which is made if it is missing, while the context lasts. Yields a check,
    for between two steps, that raises EyasError once a bucket's lease is lost, or a local folder was removed
    or is another process's: somebody may begin anew where he thought that nobody is at work any more.

    The system releases the lock of a local folder when the process ends, however it ends; the lease of a
    folder in a bucket lapses some minutes after. EyasError, naming process and host, while another one
    holds it.
    """
    if storage.is_remote(folder):
        with lease.leased(storage.join(folder, FILE)) as check:
            yield check
        return
    with _held(os.path.join(storage.local_path(folder), FILE), folder, "folder") as check:
        yield check


@contextmanager
def locked_file(path: str) -> Iterator[Callable[[], None]]:
    """Like `locked`, of a single local file, by a file `.NAME.lock` beside it. Two links to one file have two
    locks: give the file's own path."""
    folder, name = os.path.split(path)
    with _held(os.path.join(folder, f".{name}{FILE}"), path, "file") as check:
        yield check


@contextmanager
def watched(folder: str) -> Iterator[Callable[[], bool]]:
    """Yields what tells whether a local folder is still the one that it was, and none in its place."""
    with library_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # so that no other folder gets its number

    def is_same() -> bool:
        try:
            return os.path.samestat(os.stat(folder), os.fstat(handle))
        except FileNotFoundError:
            return False

    try:
        yield is_same
    finally:
        os.close(handle)


@contextmanager
def _held(lock: str, place: str, kind: str) -> Iterator[Callable[[], None]]:
    folder = os.path.dirname(lock)
    with library_errors(lock):
        os.makedirs(folder, exist_ok=True)
    handles = [_opened(lock, place, kind)]

    def check() -> None:
        try:
            if os.path.samestat(os.stat(lock), os.fstat(handles[-1])):
                return
        except FileNotFoundError:
            if not is_same():
                raise EyasError(f"{place} was removed while this process was at work there") from None
        except OSError:  # a disk that fails says so where it is written
            return
        handles.append(_opened(lock, place, kind))

    try:
        with watched(folder) as is_same:
            yield check
    finally:
        for handle in handles:
            os.close(handle)


def _opened(lock: str, place: str, kind: str) -> int:
    with library_errors(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _take(handle, place, kind)
        except BaseException:
            os.close(handle)
            raise
    return handle


def _take(handle: int, place: str, kind: str) -> None:
    try:
        _try(handle)
    except BlockingIOError:
        holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
        raise EyasError(
            f"{place} is in use by {holder}; wait until it ends, or name another {kind}"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        note(f"{place} is on a file system without locks: let no other process work in it")
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _try(handle: int) -> None:
    """Takes the lock, also where somebody just looks at it. BlockingIOError if another process holds it."""
    for _ in range(_GLANCES):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_GLANCE)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_use(folder: str) -> bool:
    """Whether a process holds the lock of `folder`; False where that cannot be told.

    It shares the lock of a local one for an instant, for which `locked` waits.
    """
    if storage.is_remote(folder):
        return lease.holder(storage.join(folder, FILE)) is not None
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # of a pipe it would wait for a writer
        handle = os.open(os.path.join(storage.local_path(folder), FILE), flags)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False
