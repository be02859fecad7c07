"""Files and folders by path or URL (fsspec): checked reads, atomic writes of files, room.

A join cannot leave its folder. Every file is written whole or not at all, and every library's error is one
line (see library_errors.py).
"""

import fcntl
import json
import os
import posixpath
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from tqdm import tqdm

from common import strict_json
from common.errors import EyasError
from common.library_errors import library_errors

PARTIAL = ".partial"  # how the name of a file that is being written ends
_BEGIN_SECONDS = 60.0  # after which who has made a file has locked it
_TIMEOUT = 30.0  # seconds for a server to connect, or to go on answering; gcsfs tries six times
_ONE_SLASH = re.compile(r"(gs|gcs|s3|hf|https?|file):/(?!/)")
_JSON_BYTES = 200_000_000  # beyond any file that a model or a store has


def is_remote(url: str) -> bool:
    """True for `scheme://…` other than `file://`."""
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    """The path of a local URL, with `~` expanded and no `..` or `//`, which TensorStore does not take.

    EyasError for gs:/BUCKET, which would be a folder here.
    """
    if mistyped := _ONE_SLASH.match(url):
        raise EyasError(f"{url} has one slash behind {mistyped[1]}: and needs two; write {mistyped[1]}://…")
    path = os.path.expanduser(url.removeprefix("file://"))
    # Behind a link, `..` is the parent of what it points to.
    return os.path.realpath(path) if ".." in path.split("/") else os.path.normpath(path)


def join(base: str, *parts: str) -> str:
    """`base/part/…`; EyasError if a part is absolute, climbs out with `..`, or is no name of a file."""
    tail = posixpath.normpath(posixpath.join(*parts))
    if tail.startswith(("/", "..")) or "\\" in tail or ":" in tail or not tail.isprintable():
        raise EyasError(f"{'/'.join(parts)!r} points outside of {base}; name a file inside that folder")
    return f"{base.rstrip('/')}/{tail}"


def is_inside(url: str, folder: str) -> bool:
    """Whether a file or folder is, or would be, the folder or in it."""
    if is_remote(url) != is_remote(folder):
        return False
    inner, outer = (
        one.rstrip("/") if is_remote(one) else os.path.realpath(local_path(one)) for one in (url, folder)
    )
    return f"{inner}/".startswith(f"{outer}/")


def exists(url: str) -> bool:
    """True if a file or folder is there."""
    if not is_remote(url):
        return os.path.exists(local_path(url))
    with library_errors(url, "read"):
        fs, path = filesystem(url)
        return fs.exists(path)


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of a path or URL; requests that hang end after a while.

    EyasError for a pipe or a device, of which a read may never end, for a scheme that fsspec does not know,
    and where it lacks a package.
    """
    if not is_remote(url):
        require_no_device(url)
        return fsspec.core.url_to_fs(local_path(url))
    if url.startswith(("gs://", "gcs://")):
        if url.split("/")[2] == "":
            raise EyasError(f"{url} names no bucket; expected gs://BUCKET/FOLDER")
        import aiohttp

        options = fsspec.config.conf.setdefault("gcs", {})  # also for what orbax opens by itself
        options["use_listings_cache"] = False  # others write meanwhile: what is asked is asked of the server
        options["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise EyasError(f"{url} needs a package that is not here ({error}); or name a local copy") from None
    except ValueError as error:
        raise EyasError(f"{url} cannot be opened ({error}); name a path, or gs://BUCKET/FOLDER") from None


def require_no_device(url: str) -> None:
    """EyasError for a local pipe or device, of which a read may never end."""
    if is_remote(url):
        return
    with suppress(OSError):  # missing, say: that is for who reads it
        mode = os.stat(local_path(url)).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise EyasError(f"{url} is a pipe or a device, which is not read; name a file")


def size(url: str) -> int:
    """The bytes of a file. EyasError if it is missing or a folder."""
    with library_errors(url, "read"), _missing(url):
        fs, path = filesystem(url)
        found = fs.info(path)
        if found["type"] == "directory":
            raise EyasError(f"{url} is a folder, but a file is needed; check the path")
        return found["size"]


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The file's bytes from `start` up to `stop`. EyasError if it is missing or a folder."""
    with library_errors(url, "read"), _missing(url):
        fs, path = filesystem(url)
        return fs.cat_file(path, start=start, end=stop)


@contextmanager
def as_local(url: str) -> Iterator[str]:
    """The path of a local file, or of a temporary copy of a remote one. Raises as `read_bytes` does."""
    if not is_remote(url):
        read_bytes(url, 0, 1)
        yield local_path(url)
        return
    data = read_bytes(url)
    with tempfile.TemporaryDirectory(prefix="eyas-") as folder:
        path = os.path.join(folder, posixpath.basename(url))
        with library_errors(path), open(path, "wb") as file:
            file.write(data)
        yield path


@contextmanager
def _missing(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise EyasError(f"{url} is missing; check the path") from None
    except (IsADirectoryError, NotADirectoryError):
        raise EyasError(f"{url} is a folder or inside of a file; check the path") from None


def read_json(url: str) -> Any:
    """The file's JSON value. EyasError if it is missing, not JSON, or larger than any that Eyas knows."""
    if not is_remote(url) and size(url) > _JSON_BYTES:
        raise EyasError(f"{url} has more than the {_JSON_BYTES:,} bytes of any such file; restore it")
    return strict_json.parse(read_bytes(url), url)


def read_object(url: str) -> dict[str, Any]:
    """The file's JSON object. EyasError as `read_json`, and if the file holds another kind of value."""
    value = read_json(url)
    if not isinstance(value, dict):
        raise EyasError(f"{url} holds a JSON {type(value).__name__} where an object is expected; restore it")
    return value


def write_bytes(url: str, data: bytes) -> None:
    """Writes the whole file or nothing: temporary file, fsync and rename locally; one object remotely."""
    if is_remote(url):
        with library_errors(url):
            fs, path = filesystem(url)
            fs.pipe_file(path, data)
        return
    with library_errors(url):
        _write_local(local_path(url), (data,))


def write_pieces(url: str, pieces: Iterable[bytes]) -> None:
    """Like `write_bytes`, of a local file that need not be in memory as a whole."""
    with library_errors(url):
        _write_local(local_path(url), pieces)


def _write_local(path: str, pieces: Iterable[bytes]) -> None:
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            _lock(handle)  # until the file has its name
            _remove_dead(folder, f".{os.path.basename(path)}.")
            file.writelines(pieces)
            file.flush()
            os.fsync(handle)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _lock(handle: int) -> bool:
    """Locks an open file for this writer; False if another one has it, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_partial(folder: str) -> None:
    """Removes what killed writers left in a local folder, and nothing that one is writing."""
    if is_remote(folder):
        return
    with library_errors(folder), suppress(FileNotFoundError):
        _remove_dead(local_path(folder), ".")


def is_partial(name: str) -> bool:
    """Whether a file or folder of that name is being written, or was left by a writer that was killed."""
    return name.startswith(".") and name.endswith(PARTIAL)


def _remove_dead(folder: str, start: str) -> None:
    """Removes the files whose names begin with `start` that killed writers left."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(start) and is_partial(name) and os.path.isfile(path):
            with suppress(FileNotFoundError, PermissionError), open(path, "rb") as file:
                found = os.fstat(file.fileno())
                begun = found.st_size == 0 and time.time() - found.st_mtime < _BEGIN_SECONDS
                if not begun and _lock(file.fileno()):
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
    path = _nearest(url)
    if not os.path.isdir(path):
        raise EyasError(f"{url} cannot be a folder: {path} is a file; name another place")
    if not os.access(path, os.W_OK | os.X_OK):
        raise EyasError(f"{url} cannot be written: {path} is read-only for you; name another place")


def _nearest(url: str) -> str:
    """The path of a local `url`, or of the innermost folder above it that exists."""
    path = os.path.abspath(local_path(url))
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def require_file(url: str) -> None:
    """EyasError if a local `url` cannot be a file to write: it is a folder, or there can be none for it."""
    if is_remote(url):
        return
    path = os.path.abspath(local_path(url))
    if os.path.isdir(path):
        raise EyasError(f"{url} is a folder where a file is to be written; name a file")
    require_folder(os.path.dirname(path))


def list_names(url: str) -> list[str]:
    """Sorted names (not paths) in a folder; [] if there is no such folder. EyasError if it is a file."""
    if not is_remote(url) and os.path.isfile(local_path(url)):
        raise EyasError(f"{url} is a file where a folder is expected; remove it, or name another place")
    try:
        with library_errors(url, "list"):
            if not is_remote(url):
                return sorted(os.listdir(local_path(url)))
            fs, path = filesystem(url)
            found = fs.ls(path, detail=False, refresh=True)
    except FileNotFoundError:
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in found)


def require_room(url: str, need: int, what: str, advice: str) -> None:
    """EyasError if the disk of `url` (a folder, there or not) has less room than `need` bytes for `what`."""
    if is_remote(url):
        return
    free = shutil.disk_usage(_nearest(url)).free
    if need > free:
        raise EyasError(
            f"{what} need {tqdm.format_sizeof(need, 'B')}, the disk of {url} has "
            f"{tqdm.format_sizeof(free, 'B')} left; {advice}"
        )
