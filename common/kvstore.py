"""TensorStore's key-value stores: folders that arrays lie in, and files that are written on condition.

A condition is kept by the store itself (a lock of the file system, a generation of the bucket), so that of
several writers at once one wins and the others are told.
"""

import functools
import os
import posixpath
import re
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from common import stopping, storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.texts import is_unicode

_QUIET = {"TIME_SECONDS": "30", "LIMIT_BYTES": "1"}  # less in that time, and a request has failed
INDICES = "cache_pool#indices"  # what of arrays is kept in memory: the indices of shards, never chunks
_INDEX_BYTES = 64 << 20  # as TensorStore counts: 0.15 kB and 16 bytes a chunk of what takes 4 kB and them
_BUCKET = re.compile(r"(gs|gcs|s3)://([^/]+)/?(.*)")
_DRIVERS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


@functools.cache
def context() -> ts.Context:
    """What every request shares."""
    # One request to GCS gives about 200 MB/s and takes up to a second: rates come from many at once.
    # A server that is away is tried for two minutes, one that says nothing for five, about as gcsfs does.
    for name, value in _QUIET.items():
        os.environ.setdefault(f"TENSORSTORE_CURL_LOW_SPEED_{name}", value)
    retries = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "30s"}
    return ts.Context(
        {
            "gcs_request_concurrency": {"limit": 256},
            "gcs_request_retries": retries,
            INDICES: {"total_bytes_limit": _INDEX_BYTES},
        }
    )


def result(future: ts.Future) -> Any:
    """What a request gives. Raises Stopped if the main thread is asked to stop meanwhile: a server may not
    answer for minutes."""
    return stopping.awaited(future, stopping.check)


def folder(url: str) -> dict:
    """The key-value store of a folder: a local path, or gs:// or s3://BUCKET/PREFIX. EyasError for others.

    Objects have the names that fsspec gives them, by which files are read.
    """
    if found := _BUCKET.fullmatch(url.rstrip("/")):
        # Not the URL itself, in which `%` and a few other characters mean something else.
        path = f"{found[3]}/" if found[3] else ""
        return {"driver": _DRIVERS[found[1]], "bucket": found[2], "path": path}
    if storage.is_remote(url):
        raise EyasError(f"{url}: arrays are not kept there; name a local folder, or gs://BUCKET/FOLDER")
    # Mapped files save one of three copies: 1.5 times the rate of pread, measured on 2 cores with the files
    # in the page cache. Shards appear by rename and never change, so a mapping cannot lose its file's end.
    path = f"{os.path.abspath(storage.local_path(url)).rstrip('/')}/"
    if not is_unicode(path):
        raise EyasError(f"{path!a} is not UTF-8, so no arrays can be kept there; rename it")
    return {"driver": "file", "path": path, "file_io_mode": {"mode": "memmap"}}


def place(store: ts.KvStore) -> str:
    """Where a store's files lie: an absolute path, or a URL."""
    # Its spec would say it too, but whatever TensorStore makes JSON of stays in memory for good.
    scheme, path = store.url.split("://", 1)
    return unquote(path) if scheme == "file" else f"{scheme}://{unquote(path)}"


def create_file(url: str, data: bytes) -> bool:
    """Writes the file, whole and durably, unless there is one; False if there is. EyasError if it cannot
    be written."""
    return _replace(url, None, data)


def remove_file(url: str, old: bytes) -> bool:
    """Removes the file if it holds `old`, else returns False. EyasError if it cannot be removed."""
    return _replace(url, old, None)


def replace_file(url: str, old: bytes, new: bytes) -> bool:
    """Writes `new` in the place of `old`, whole and durably; False if the file is missing or holds anything
    else. EyasError if it cannot be written."""
    return _replace(url, old, new)


def _replace(url: str, old: bytes | None, new: bytes | None) -> bool:
    place, name = posixpath.split(url)
    storage.require_no_device(url)
    with library_errors(url):
        files = result(ts.KvStore.open(folder(place), context=context()))
        found = result(files.read(name))
        if (found.value if found.state == "value" else None) != old:
            return False
        return bool(result(files.write(name, new, if_equal=found.stamp.generation)).generation)
