"""What a store reads whole and has one sum of: files, tables, small arrays. Damage is an EyasError."""

import hashlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from common import storage, zarr
from common.errors import DamagedError, EyasError, MachineError
from common.row_cache import RowCache

Value = TypeVar("Value")


def sha256(data: bytes) -> str:
    """The sum of a file, as the manifest has it."""
    return hashlib.sha256(data).hexdigest()


class Checked:
    """Reads below the store `url`; `cache` keeps files, under keys that begin with `prefix`."""

    def __init__(self, url: str, prefix: str, cache: RowCache | None):
        self._url, self._prefix, self._cache = url, prefix, cache

    def twice(self, fetch: Callable[[], Value]) -> Value:
        """What `fetch` gives. From a bucket it is fetched once more if it came damaged: what is stored may be
        whole."""
        try:
            return fetch()
        except MachineError:
            raise
        except EyasError:
            if not storage.is_remote(self._url):
                raise
        return fetch()

    def file(self, place: str, wanted: str, damaged: str) -> bytes:
        """A file with this sha256; DamagedError of that text if it has another."""

        def fetch() -> bytes:
            data = storage.read_bytes(place)
            if sha256(data) != wanted:
                raise DamagedError(damaged)
            return data

        if self._cache is None:
            return self.twice(fetch)
        key = f"{self._prefix}/files/{wanted}"
        data = self._cache.read(key)
        if data is None or sha256(data) != wanted:
            if data is not None:
                self._cache.drop(key)
            data = self.twice(fetch)
            self._cache.write(key, data)
        return data

    def table(self, name: str, sha: str, columns: dict[str, pa.DataType], whole: bool = False) -> pa.Table:
        """These columns of a Parquet file with this sha256, of types that fit into these; all, if `whole`."""
        place = f"{self._url}/{name}"
        damaged = f"{place} is damaged: it is not the file that the manifest names; prepare a new store"
        data = self.file(place, sha, damaged)
        try:
            table = pyarrow.parquet.read_table(io.BytesIO(data), columns=None if whole else list(columns))
            table.select(list(columns)).cast(pa.schema(columns))
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise EyasError(f"{place} is not what prepare writes ({reason}); prepare a new store") from None
        return table

    def array(self, path: str, described: dict[str, Any], crc32: int) -> np.ndarray:
        """The array at `path`, such as rows/token_counts, that the manifest describes so, with this crc32."""
        return self.twice(lambda: self._array(path, described, crc32))

    def _array(self, path: str, described: dict[str, Any], crc32: int) -> np.ndarray:
        folder, name = path.split("/")
        place = f"{self._url}/{path}"
        opened = zarr.open_array(place, described)
        advice = "run the same dump command" if folder == "features" else "prepare a new store"
        try:
            found = zarr.read_rows({name: opened}, np.arange(described["shape"][0]))[name]
        except DamagedError as error:
            raise DamagedError(f"{self._url}: {error}; {advice}") from error
        if zarr.crc32(found) != crc32:
            raise DamagedError(f"{place}: {name} is damaged on disk (checksums differ); {advice}")
        return found
