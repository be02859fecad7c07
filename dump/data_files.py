"""Which files `--data` names, and their bytes: files, folders, patterns and URLs (fsspec), packed or not.

- A folder gives the data files below it, in the order of their names; hidden ones and descriptions of data
  sets are left out. All must be of one kind, else a pattern has to choose.
- A pattern (`data/train-*.parquet`, `gs://bucket/**/*.jsonl`) gives the files that it fits. Quote it, or else
  the shell replaces it.
- `hf://datasets/OWNER/NAME` is a folder of the Hugging Face Hub.
- `.gz`, `.bz2`, `.xz` and `.zst` behind `.json` and `.jsonl` are unpacked while they are read.
"""

import bz2
import gzip
import io
import itertools
import lzma
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from fsspec.utils import glob_translate

from common import storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.texts import first_line

JSON_KINDS = (".json", ".jsonl", ".ndjson")
TABLE_KINDS = (".parquet", ".arrow", ".feather")
PACKED = (".gz", ".bz2", ".xz", ".zst")
_DESCRIPTIONS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    ".settings.json",  # beside regenerated answers
)
_FACTS = ("size", "mtime", "ino", "generation", "ETag")  # of disks and buckets
_BUFFER = 1 << 18

Advance = Callable[[int], None]  # told how many more bytes have been read


def name_of(url: str) -> str:
    """The file's name, without its folder and without what a web address has behind `?`."""
    return posixpath.basename(url.split("?")[0] if _is_web(url) else url)


def kind_of(url: str) -> str:
    """`.jsonl` of `a/b.jsonl.gz`; EyasError if it is none of those that are read."""
    stem, ending = posixpath.splitext(name_of(url).lower())
    packed = ending in PACKED
    kind = posixpath.splitext(stem)[1] if packed else ending
    if kind in JSON_KINDS or (kind in TABLE_KINDS and not packed):
        return kind
    known = ", ".join((*JSON_KINDS, *TABLE_KINDS))
    raise EyasError(
        f"{url} is of an unknown kind; expected one of {known}, the first three also packed (.gz)"
    )


def find_files(paths: tuple[str, ...]) -> list[str]:
    """The data files that `paths` name, in order. EyasError for one that names none."""
    return [file for path in paths for file in _find(path)]


def _find(path: str) -> list[str]:
    if _is_web(path):
        return [path]
    with readable(path):
        fs, root = storage.filesystem(path)
        if fs.isdir(root):
            found = [f for f in fs.find(root) if _is_data(f, root)]
            kinds = sorted({kind_of(f) for f in found})
            if len(kinds) > 1:
                raise EyasError(
                    f"{path} holds files of several kinds ({', '.join(kinds)}); name those to read by a "
                    f"quoted pattern, such as '{path.rstrip('/')}/**/*{kinds[0]}'"
                )
            empty = (
                f"{path} is a folder without data files; expected {', '.join((*JSON_KINDS, *TABLE_KINDS))}"
            )
        elif any(sign in path for sign in "*?[") and not fs.exists(root):
            found = [f for f in fs.glob(root) if not fs.isdir(f)]
            empty = f"no file fits the pattern {path}; check it"
        else:
            return [path]
    if not found:
        raise EyasError(empty)
    return [fs.unstrip_protocol(f) if storage.is_remote(path) else f for f in sorted(found)]


def require_apart(paths: Iterable[str], files: Iterable[str]) -> None:
    """EyasError if one of `files`, which are to be written, would be found as data of `paths` from then on:
    the same command would read other data."""
    for path, file in itertools.product(paths, files):
        if _would_find(path, file):
            raise EyasError(f"{file} would be data of {path} itself; name another place for what is written")


def _would_find(path: str, file: str) -> bool:
    if storage.is_remote(path) or storage.is_remote(file):
        if path.partition("://")[0] != file.partition("://")[0] or _is_web(path):
            return False
        real: Callable[[str], str] = str
    else:
        real = os.path.realpath
    with readable(path):
        fs, root = storage.filesystem(path)
        place = storage.filesystem(file)[1]
        if fs.isdir(root):
            place, root = real(place), real(root).rstrip("/")
            return place.startswith(f"{root}/") and _is_data(place, root)
        return place == root or bool(re.fullmatch(glob_translate(real(root)), real(place)))


def _is_data(path: str, root: str) -> bool:
    parts = path[len(root) :].strip("/").split("/")
    if any(part.startswith(".") for part in parts) or parts[-1].endswith(_DESCRIPTIONS):
        return False
    try:
        return bool(kind_of(path))
    except EyasError:
        return False


def version(url: str) -> dict[str, Any]:
    """What tells a file from the one that replaces it, or that it has become; {} of what a web server has."""
    if _is_web(url):
        return {}
    with readable(url):
        fs, path = storage.filesystem(url)
        about = fs.info(path)
    return {name: about[name] for name in _FACTS if name in about}


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@contextmanager
def opened(url: str, advance: Advance | None = None) -> Iterator[BinaryIO]:
    """The file as it is; with `advance`, which is told how many bytes are read, packed files are unpacked."""
    with readable(url):
        fs, path = storage.filesystem(url)
        with fs.open(path, "rb") as file:
            if advance is None:
                yield file
                return
            counted = io.BufferedReader(_Counted(file, advance), _BUFFER)
            unpack = _UNPACK.get(posixpath.splitext(name_of(url).lower())[1])
            try:
                yield io.BufferedReader(unpack(counted), _BUFFER) if unpack else counted
            except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, _DamagedError) as error:
                raise EyasError(f"{url} cannot be unpacked ({first_line(error)}); fetch it again") from None


@contextmanager
def readable(url: str) -> Iterator[None]:
    """Turns what cannot be found, read or unpacked into one line."""
    remote = storage.is_remote(url)
    try:
        if remote:
            fsspec.get_filesystem_class(url.partition("://")[0])
        with library_errors(url, "read") if remote else nullcontext():
            yield
    except FileNotFoundError:
        raise EyasError(f"the data file {url} does not exist; check the path") from None
    except IsADirectoryError:
        raise EyasError(f"{url} is a folder; name the data files in it") from None
    except EyasError:
        raise
    except (ImportError, OSError, ValueError) as error:  # also an unknown protocol
        raise EyasError(f"{url} cannot be read: {first_line(error)}") from None


class _Counted(io.RawIOBase):
    """Tells how many bytes of a file are read."""

    def __init__(self, file: Any, advance: Advance):
        self._file, self._advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        self._advance(len(piece))
        return len(piece)


class _DamagedError(Exception):
    """A zstandard file is damaged."""


class _Unpacked(io.RawIOBase):
    """A zstandard file, by Arrow's codec."""

    def __init__(self, file: Any):
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (OSError, pa.ArrowException) as error:
            raise _DamagedError(str(error)) from None
        buffer[: len(piece)] = piece
        return len(piece)


_UNPACK: dict[str, Any] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _Unpacked,
}
