"""Files and folders by path or URL (fsspec): whole reads, atomic writes, room, errors of one line.

A join cannot leave its folder. A folder that is written appears whole: it is written beside its place,
flushed to disk, then put there in one step.
"""

import ctypes
import errno
import json
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from tqdm import tqdm

from common.errors import EyasError, MachineError

_PARTIAL = ".partial"  # how the name of a file that is being written ends
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, fs.h
_STATUS = re.compile(r"[A-Z_]+: ")  # how TensorStore's errors begin
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# gcsfs logs a stack trace beside each error that it raises; the error alone is told, in one line.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())
logging.getLogger("gcsfs").propagate = False


def is_remote(url: str) -> bool:
    """True for `scheme://…` other than `file://`."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL, with `~` expanded."""
    return os.path.expanduser(url.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """`base/part/…`; EyasError if a part is absolute or climbs out of `base` with `..`."""
    tail = posixpath.normpath(posixpath.join(*parts))
    if tail.startswith(("/", "..")) or "\\" in tail or ":" in tail:
        raise EyasError(f"{'/'.join(parts)!r} points outside of {base}; name a file inside that folder")
    return f"{base.rstrip('/')}/{tail}"


def exists(url: str) -> bool:
    """True if a file or folder is there."""
    if not is_remote(url):
        return os.path.exists(local_path(url))
    fs, path = fsspec.core.url_to_fs(url)
    return fs.exists(path)


def read_bytes(url: str) -> bytes:
    """The whole file. EyasError if it is missing."""
    try:
        with fsspec.open(url if is_remote(url) else local_path(url), "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise EyasError(f"{url} is missing; check the path") from None
    except IsADirectoryError:
        raise EyasError(f"{url} is a folder, not a file; remove it or check the path") from None


def read_json(url: str) -> Any:
    """The file's JSON value. EyasError if it is missing or is not JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EyasError(f"{url} is not JSON ({error}); it was cut off or edited by hand") from None


def write_bytes(url: str, data: bytes) -> None:
    """Writes the whole file or nothing: temporary file, fsync and rename locally; one object remotely."""
    if is_remote(url):
        fs, path = fsspec.core.url_to_fs(url)
        fs.pipe_file(path, data)
        return
    path = local_path(url)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=_PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_partial(folder: str) -> None:
    """Removes what killed writers left in a local folder. Not while another process writes there."""
    if is_remote(folder):
        return
    for name in list_names(folder):
        if name.startswith(".") and name.endswith(_PARTIAL):
            path = os.path.join(local_path(folder), name)
            if os.path.isfile(path):
                os.unlink(path)


def json_bytes(value: Any) -> bytes:
    """`value` as the indented JSON that files hold; ValueError for a number that JSON does not have."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(url: str, value: Any) -> None:
    """Writes `json_bytes(value)` atomically."""
    write_bytes(url, json_bytes(value))


def require_folder(url: str) -> None:
    """EyasError if a local `url` cannot be a folder to write into: it, or a part of its path, is a file."""
    if is_remote(url):
        return
    path = os.path.abspath(local_path(url))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise EyasError(f"{url} cannot be a folder: {path} is a file; name another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise EyasError(f"{url} cannot be written: {path} is read-only for you; name another place")


def list_names(url: str) -> list[str]:
    """Sorted names (not paths) in a folder; [] if there is no such folder."""
    fs, path = fsspec.core.url_to_fs(url if is_remote(url) else local_path(url))
    try:
        found = fs.ls(path, detail=False, refresh=True) if is_remote(url) else os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in found)


def reason(error: Exception) -> str:
    """What TensorStore found wrong, without its spec, on one line."""
    return " ".join(str(error).split(" [")[0].split())


@contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Turns what the file system or TensorStore refuses into one line: a full disk, or what else it was."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STATUS.match(str(error)):
            raise  # not TensorStore's
        code = error.errno if isinstance(error, OSError) else None
        full = code in _FULL or any(f"os_error_code='{n}'" in str(error) for n in _FULL)
        cause = "the disk is full; make room" if full else f"writing failed ({reason(error)}); mend that"
        raise MachineError(
            f"{what}: {cause} and run the same command again; what is complete is kept"
        ) from error


def require_room(url: str, need: int, what: str, advice: str) -> None:
    """EyasError if the disk of `url` (a folder, there or not) has less room than `need` bytes for `what`."""
    if is_remote(url):
        return
    place = os.path.abspath(local_path(url))
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if need > free:
        raise EyasError(
            f"{what} need {tqdm.format_sizeof(need, 'B')}, the disk of {url} has "
            f"{tqdm.format_sizeof(free, 'B')} left; {advice}"
        )


def write_folder(folder: str, files: dict[str, bytes]) -> None:
    """Makes the local `folder` hold exactly `files` ({name: content}), or leaves it as it was.

    An older folder stays in place until the new one is on disk, then the two change names, so that a reader
    finds the one or the other at every moment. What a killed writer leaves, `.NAME.partial` beside the
    folder, the next writer removes. EyasError if `folder` is remote, is a file, holds other names than
    `files` (it may be anybody's) or cannot be written.
    """
    if is_remote(folder):
        raise EyasError(f"{folder} is not a local folder; write to a local one and copy it there")
    place = os.path.realpath(local_path(folder))
    _refuse_other_content(folder, place, set(files))
    parent, name = os.path.split(place)
    partial = os.path.join(parent, f".{name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for file, content in files.items():
            write_bytes(join(partial, file), content)
        _flush(partial)
        _put(partial, place)
        _flush(parent)
    except OSError as error:
        raise MachineError(
            f"{folder} could not be written ({error.strerror}); make room or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_other_content(folder: str, place: str, names: set[str]) -> None:
    if not os.path.exists(place):
        return
    if not os.path.isdir(place):
        raise EyasError(f"{folder} is a file; name a folder")
    others = sorted(set(os.listdir(place)) - names)
    if others:
        raise EyasError(f"{folder} already holds {', '.join(others[:3])}; name a new or an empty folder")


def _put(new: str, place: str) -> None:
    """Moves `new` to `place`; an older folder there ends up at `new`, or is gone."""
    if not os.path.exists(place):
        os.rename(new, place)
    elif not _exchange(new, place):
        # This file system cannot exchange two names: the old folder bears another one for an instant.
        aside = new.removesuffix(".partial") + ".replaced"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(place, aside)
        os.rename(new, place)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: str, b: str) -> bool:
    """Swaps two paths in one step (renameat2); False where the system or its file system has no such step."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None:
        return False
    return swap(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _flush(folder: str) -> None:
    """Forces a folder's names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
