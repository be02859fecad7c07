"""Folders of files that are replaced as one: a reader finds the old, the new or none, and never a mixture."""

import fcntl
import json
import os
import posixpath
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common import stopping, storage
from common.errors import EyasError, RestartError
from common.library_errors import library_errors
from common.progress import note

_LAST = "config.json"  # of a head
_WRITING, _LOOK = 10.0, 0.1  # seconds: of a writer between the first and the last file; between two looks


def write_folder(folder: str, files: dict[str, bytes], mark: str = "architectures") -> None:
    """Makes `folder` hold `files` ({name: content}). The last one, a JSON object, makes the folder whole.

    A new folder appears at once. In an older one, every file is replaced in one step, the last one last; if
    the last one changes, it is taken away before the others are replaced. So a reader who begins with it
    finds a whole old folder, a whole new one, or none yet, and never a mixture. Local files are all on disk
    before the first is replaced: a full disk leaves what was there. Other files of the folder stay.

    EyasError, with nothing written, if `folder` is a file or somebody else's: it holds something, but no last
    file with the same value of `mark`.
    """
    place = folder.rstrip("/") if storage.is_remote(folder) else os.path.realpath(storage.local_path(folder))
    *others, last = files
    if not storage.is_remote(place) and os.path.isfile(place):
        raise EyasError(f"{folder} is a file; name a folder")
    if storage.is_remote(place):
        old = _last_file(place, last)
        _refuse_foreign(folder, storage.list_names(place), files, old, mark)
        if old not in (None, files[last]):
            _remove(storage.join(place, last))
        for name, content in files.items():
            storage.write_bytes(storage.join(place, name), content)
        return
    parent, name = posixpath.split(place)
    partial = f"{parent}/.{name}{storage.PARTIAL}"
    with library_errors(folder), _alone(parent):
        old = _last_file(place, last) or _last_file(partial, last)
        _refuse_foreign(folder, storage.list_names(place), files, old, mark)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            os.makedirs(partial)
            for name, content in files.items():
                storage.write_bytes(storage.join(partial, name), content)
            _flush(partial)
            _put(partial, place, [*others, last], old == files[last])
            _flush(parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def read_as_one(folder: str) -> Iterator[None]:
    """For what reads several files of a head's folder, or one of them piece by piece. RestartError if one was
    replaced meanwhile, also where what was read made no sense. Weights without the file that makes them whole
    are waited for some seconds: they may be being replaced.

    A writer's order is enough for who reads each file at once, and only for him.
    """
    before = _versions(folder)
    end = time.monotonic() + _WRITING
    while _lacks_its_last(before) and time.monotonic() < end:
        stopping.check()
        time.sleep(_LOOK)
        before = _versions(folder)
    try:
        yield
    except EyasError as error:
        _require_same(folder, before, error)
        raise
    _require_same(folder, before, None)


def _lacks_its_last(files: Collection[str]) -> bool:
    return _LAST not in files and any(name.endswith(".safetensors") for name in files)


def _versions(folder: str) -> dict[str, dict[str, Any]]:
    """What tells each file from the one that replaces it: a disk's or a bucket's own facts."""
    with library_errors(folder, "read"), suppress(FileNotFoundError, NotADirectoryError):
        fs, path = storage.filesystem(folder)
        found = {posixpath.basename(about["name"]): about for about in fs.ls(path, detail=True)}
        return {name: about for name, about in found.items() if name.endswith((".json", ".safetensors"))}
    return {}


def _require_same(folder: str, before: dict[str, dict[str, Any]], error: EyasError | None) -> None:
    after = _versions(folder)
    for name in before | after:
        if before.get(name) != after.get(name):
            raise RestartError(
                f"{storage.join(folder, name)} was replaced while the folder was read; run the same command "
                "again"
            ) from error


@contextmanager
def _alone(parent: str) -> Iterator[None]:
    """Waits until no other process makes a folder in `parent`: two at once would make one of both."""
    os.makedirs(parent, exist_ok=True)
    handle = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _last_file(folder: str, name: str) -> bytes | None:
    place = storage.join(folder, name)
    return storage.read_bytes(place) if storage.exists(place) else None


def _refuse_foreign(
    folder: str, present: list[str], files: dict[str, bytes], old: bytes | None, mark: str
) -> None:
    """EyasError unless a folder that holds `present` is empty or an earlier one of the same kind."""
    if not present:
        return
    *_, last = files
    others = [name for name in present if name not in files]
    if old is None or _marked(old, mark) != _marked(files[last], mark):
        named = ", ".join((others or present)[:3])
        raise EyasError(f"{folder} already holds {named}; name a new or an empty folder")
    if others:
        note(f"{folder} also holds {', '.join(others[:3])}, which stays as it is")


def _marked(data: bytes, mark: str) -> Any:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value.get(mark) if isinstance(value, dict) else None


def _put(new: str, place: str, names: list[str], same: bool) -> None:
    """Moves the files `names` of the folder `new` to `place`; `same`: the last one is there already."""
    if not os.path.exists(place) or not os.listdir(place):
        os.replace(new, place)
        return
    last = os.path.join(place, names[-1])
    if not same and os.path.exists(last):
        os.unlink(last)
        _flush(place)
    for name in names:
        os.replace(os.path.join(new, name), os.path.join(place, name))
    _flush(place)


def _remove(url: str) -> None:
    fs, path = storage.filesystem(url)
    with library_errors(url):
        fs.rm_file(path)


def _flush(folder: str) -> None:
    """Forces a folder's names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
