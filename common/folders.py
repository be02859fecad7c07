"""Folders that appear whole: written beside their place, flushed to disk, then put there in one step."""

import ctypes
import os
import shutil

from common.errors import EyasError, MachineError
from common.files import is_remote, join, local_path, write_bytes

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, fs.h


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
