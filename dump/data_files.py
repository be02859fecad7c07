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
import lzma
import posixpath
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from huggingface_hub.errors import HfHubHTTPError

from common import storage
from common.errors import EyasError, MachineError

JSON_KINDS = (".json", ".jsonl", ".ndjson")
TABLE_KINDS = (".parquet", ".arrow", ".feather")
PACKED = (".gz", ".bz2", ".xz", ".zst")
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_BUFFER = 1 << 18
_HUB_ERRORS = (
    HfHubHTTPError.__bases__
)  # of the HTTP library that the Hub's client uses, httpx or its successor

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
        fs, root = fsspec.core.url_to_fs(path if storage.is_remote(path) else storage.local_path(path))
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


def _is_data(path: str, root: str) -> bool:
    parts = path[len(root) :].strip("/").split("/")
    if any(part.startswith(".") for part in parts) or parts[-1] in _DESCRIPTIONS:
        return False
    try:
        return bool(kind_of(path))
    except EyasError:
        return False


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


@contextmanager
def opened(url: str, advance: Advance | None = None) -> Iterator[BinaryIO]:
    """The file, unpacked, if `advance` is given, which is told of the bytes as they are on disk."""
    with readable(url), fsspec.open(url if storage.is_remote(url) else storage.local_path(url), "rb") as file:
        if advance is None:
            yield file
            return
        counted = io.BufferedReader(_Counted(file, advance), _BUFFER)
        ending = posixpath.splitext(name_of(url).lower())[1]
        if ending == ".zst":
            yield io.BufferedReader(_Unpacked(counted), _BUFFER)
        elif ending in _UNPACK:
            yield io.BufferedReader(_UNPACK[ending](counted), _BUFFER)
        else:
            yield counted


_UNPACK: dict[str, Any] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


@contextmanager
def readable(url: str) -> Iterator[None]:
    """Turns what cannot be read into one line."""
    try:
        yield
    except FileNotFoundError:
        raise EyasError(f"the data file {url} does not exist; check the path") from None
    except IsADirectoryError:
        raise EyasError(f"{url} is a folder; name the data files in it") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise EyasError(f"{url} cannot be unpacked ({_first_line(error)}); fetch it again") from None
    except EyasError:
        raise
    except (ImportError, OSError, ValueError) as error:  # also an unknown protocol
        raise EyasError(f"{url} cannot be read: {_first_line(error)}") from None
    except _HUB_ERRORS as error:
        raise MachineError(f"{url} cannot be reached: {_first_line(error)}; check the network") from None


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


class _Unpacked(io.RawIOBase):
    """A zstandard file, by Arrow's codec."""

    def __init__(self, file: Any):
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
