"""Small files by path or URL (fsspec): whole reads, atomic writes, joins that cannot leave a folder."""

import json
import logging
import os
import posixpath
import tempfile
from typing import Any

import fsspec

from common.errors import EyasError

_PARTIAL = ".partial"  # how the name of a file that is being written ends

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
    except FileNotFoundError:
        raise EyasError(f"{url} is missing; check the path") from None


def read_json(url: str) -> Any:
    """The file's JSON value. EyasError if it is missing or is not JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
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


def write_json(url: str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_bytes(url, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


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
