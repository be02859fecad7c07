"""The feature store, read side: manifest, index, rows, features and the target's tensors.

    STORE/manifest.json        {"schema", "rows", "features"}: what is in it; written atomically
    STORE/index.parquet        a line a conversation: id, split, row, start, length, counted
    STORE/rows/NAME            zarr v3: tokens, segment_ids, positions, loss_mask [R, T], token_counts [V]
    STORE/features/NAME        zarr v3: states and logits [R, T, ...]
    STORE/commits/000042.json  a block of rows is durable: rows, counts, checksums; written last
    STORE/target/              the target's embed_tokens, lm_head, config.json and tokenizer files

A block without its commit marker does not exist. `common/store_writer.py` writes, `common/store_verify.py`
checks.
"""

import hashlib
import io
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8_e4m3fn with numpy)
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import tensorstore as ts

from common import safetensors, storage, zarr
from common.config import digest
from common.errors import EyasError

SCHEMA = 1
MANIFEST = "manifest.json"
INDEX = "index.parquet"
CHECKSUMS = "checksums.json"  # of the tensors in target/; written last there
_MARKER = re.compile(r"(\d{6})\.json")
_READERS = 32  # small files read at once
_REPAIR = (
    "to write a block anew, delete its file in commits/ and run the same dump command; damaged rows must be "
    "prepared anew"
)


def read_manifest(url: str) -> dict[str, Any]:
    """The manifest of a store; EyasError if there is none, it is damaged, or a newer Eyas wrote it."""
    place = f"{url.rstrip('/')}/{MANIFEST}"
    if not storage.exists(place):
        raise EyasError(f"{url} is no feature store (it has no {MANIFEST}); check the path or run prepare")
    manifest = storage.read_json(place)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise EyasError(f"{place} has no schema number, so it is no store's manifest; check the path")
    if manifest["schema"] > SCHEMA:
        raise EyasError(
            f"{url} has schema {manifest['schema']}, newer than {SCHEMA}, which this Eyas reads; update Eyas"
        )
    _check_rows(place, manifest)
    return manifest


def _check_rows(place: str, manifest: dict[str, Any]) -> None:
    rows = manifest.get("rows")
    if not isinstance(rows, dict):
        raise EyasError(f'{place} has no "rows" section; run prepare on this store first')
    for field in ("rows", "length", "vocab_size"):
        if not isinstance(rows.get(field), int) or rows[field] < 1:
            raise EyasError(
                f"{place}: rows.{field} is {rows.get(field)!r}, expected a number above 0; restore it"
            )
    for section in ("rows", "features"):
        if section in manifest and not isinstance(manifest[section].get("arrays"), dict):
            raise EyasError(f"{place}: {section}.arrays is missing; the file was edited: restore it")


class Store:
    """A feature store opened for reading. Whatever is wrong with it is an EyasError; no number is made up."""

    def __init__(self, url: str, manifest: dict[str, Any]):
        self.url = url.rstrip("/")
        self.manifest = manifest
        self.hash = digest(manifest)
        self.rows: int = manifest["rows"]["rows"]
        self.length: int = manifest["rows"]["length"]
        self._open: dict[str, ts.TensorStore] = {}
        self._sums: dict[int, dict[str, list[int]]] = {}  # of the blocks that are known to be committed

    @classmethod
    def open(cls, url: str) -> "Store":
        """EyasError if `url` is no store, is damaged, or has a newer schema."""
        return cls(url, read_manifest(url))

    @property
    def features(self) -> dict[str, Any]:
        """The manifest's section on features; EyasError where no dump has started."""
        if "features" not in self.manifest:
            raise EyasError(f"{self.url} has rows but no features yet; run dump on it first")
        return self.manifest["features"]

    @property
    def blocks(self) -> int:
        """The number of blocks of a complete store."""
        return -(-self.rows // self.features["block_rows"])

    def block_range(self, block: int) -> range:
        """The rows of a block; the last one may be short."""
        size = self.features["block_rows"]
        return range(block * size, min((block + 1) * size, self.rows))

    def committed(self) -> set[int]:
        """The blocks that have a commit marker now."""
        names = storage.list_names(f"{self.url}/commits")
        return {int(found[1]) for name in names if (found := _MARKER.fullmatch(name))}

    def commit(self, block: int) -> dict[str, Any]:
        """A block's commit marker; EyasError if another manifest was in force when it was written."""
        place = f"{self.url}/commits/{block:06d}.json"
        marker = storage.read_json(place)
        if not isinstance(marker, dict) or marker.get("store") != self.hash:
            raise EyasError(
                f"{place} was written under another manifest: {MANIFEST} was edited since; restore it"
            )
        if not isinstance(marker.get("crc32c"), dict):
            raise EyasError(f"{place} has no checksums; delete it and run the same dump command")
        return marker

    def commits(self) -> list[dict[str, Any]]:
        """Every commit marker, in the order of the blocks."""
        return self._commits(self.committed())

    def _commits(self, blocks: set[int]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(_READERS) as pool:
            markers = list(pool.map(self.commit, sorted(blocks)))
        self._sums |= {marker["block"]: marker["crc32c"] for marker in markers}
        return markers

    def require_complete(self) -> None:
        """EyasError unless every block is committed under this manifest."""
        missing = sorted(set(range(self.blocks)) - self.committed())
        if missing:
            raise EyasError(
                f"{self.url} is partial: {len(missing)} of {self.blocks} blocks are missing (the first is "
                f"{missing[0]}); run the same dump command again, it continues where it stopped"
            )
        self.commits()

    def require_target(self, config_hash: str) -> None:
        """EyasError unless the features are of the target with this configuration hash."""
        target = self.features["target"]
        if target["config_hash"] != config_hash:
            raise EyasError(
                f"{self.url} holds features of another model ({target['name']}, {target['architecture']}, "
                f"configuration {target['config_hash'][:12]}, not {config_hash[:12]}); name that model, or "
                "dump into a new store"
            )

    def index(self) -> pa.Table:
        """One line a conversation: id, split, row, start, length, counted."""
        place = f"{self.url}/{INDEX}"
        data = storage.read_bytes(place)
        if hashlib.sha256(data).hexdigest() != self.manifest["rows"].get("index_sha256"):
            raise EyasError(
                f"{place} is damaged: it is not the file that the manifest names; prepare a new store"
            )
        return pyarrow.parquet.read_table(io.BytesIO(data))

    def split_rows(self, split: str) -> np.ndarray:
        """The rows of "train" or "test", int64 ascending; a row belongs to one split."""
        table = self.index()
        return np.unique(table.filter(pc.equal(table["split"], split))["row"].to_numpy()).astype(np.int64)

    def token_counts(self) -> np.ndarray:
        """How often each token is counted (loss mask 1) in the train split, int64 [V]."""
        return self.read_unchecked(["token_counts"], np.arange(self.manifest["rows"]["vocab_size"]))[
            "token_counts"
        ]

    def draft_ids(self) -> np.ndarray | None:
        """The ids behind draft_logits, int32 [N] ascending; None where the codec is not `draft`."""
        codec = self.features["codec"]
        if codec["name"] != "draft":
            return None
        size = codec["size"]
        opened = zarr.open_array(f"{self.url}/features/draft_ids", (size,), np.dtype(np.int32))
        return zarr.read_rows({"draft_ids": opened}, np.arange(size))["draft_ids"]

    def read(self, names: list[str] | tuple[str, ...], rows: Any) -> dict[str, np.ndarray]:
        """{name: [n, T, ...]} in the order of `rows` (any order, repeats allowed).

        All requests are in flight at once and consecutive rows share one. bfloat16 and float8_e4m3fn come as
        the ml_dtypes of that name. EyasError for unknown names, rows outside of the store or in a block that
        is not committed, and missing or damaged chunks.
        """
        rows = np.asarray(rows, np.int64)
        outside = rows[(rows < 0) | (rows >= self.rows)]
        if len(outside):
            raise EyasError(f"{self.url} has rows 0 to {self.rows - 1}; row {outside[0]} was asked for")
        features = [name for name in names if name not in self.manifest["rows"]["arrays"]]
        if len(rows) and features:
            self._require_committed(rows)
        found = self.read_unchecked(names, rows)
        for name in features:
            self._require_sums(name, rows, found[name])
        return found

    def _require_committed(self, rows: np.ndarray) -> None:
        unknown = set(np.unique(rows // self.features["block_rows"]).tolist()) - self._sums.keys()
        if not unknown:
            return
        missing = unknown - self.committed()
        if missing:
            raise EyasError(
                f"{self.url} is partial: block {min(missing)} is not committed; run the same dump command "
                "again, it continues where it stopped"
            )
        self._commits(unknown)

    def _require_sums(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        size = self.features["block_rows"]
        sums = zarr.row_sums(values)
        bad = [
            row
            for row, found in zip(rows.tolist(), sums, strict=True)
            if found != self._sums[row // size][name][row % size]
        ]
        if bad:
            raise EyasError(f"{self.url}: {name} rows {bad}: damaged on disk (checksums differ); {_REPAIR}")

    def read_unchecked(self, names: list[str] | tuple[str, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        """`read` without commits and their checksums; also of `token_counts`, whose rows are tokens."""
        opened = {name: self._array(name) for name in names}
        try:
            return zarr.read_rows(opened, rows)
        except EyasError as error:
            raise EyasError(f"{self.url}: {error}; {_REPAIR}") from error

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            for section in ("rows", "features"):
                described = self.manifest.get(section, {}).get("arrays", {}).get(name)
                if described is not None:
                    shape, dtype = tuple(described["shape"]), np.dtype(described["dtype"])
                    self._open[name] = zarr.open_array(f"{self.url}/{section}/{name}", shape, dtype)
                    break
            else:
                known = [*self.manifest["rows"]["arrays"], *self.features["arrays"]]
                raise EyasError(f"{self.url} has no array {name}; it has {', '.join(known)}")
        return self._open[name]

    def target_tensor(self, name: str) -> np.ndarray:
        """The target's "embed_tokens" or "lm_head", [V, H] in its own dtype; one and the same where tied.

        EyasError if it is missing or its bytes are not those that dump wrote.
        """
        folder = f"{self.url}/target"
        sums = storage.read_json(f"{folder}/{CHECKSUMS}")
        name = name if name in sums else "embed_tokens"
        tensors = safetensors.Checkpoint.open(folder)
        if name not in tensors.tensors or zarr.crc32(found := tensors.read(name)) != sums[name]:
            raise EyasError(
                f"{folder}: {name} is missing or damaged; delete {CHECKSUMS} there and run the same dump "
                "command, which writes target/ anew"
            )
        return found

    def target_config(self) -> dict[str, Any]:
        """The target's config.json."""
        return storage.read_json(f"{self.url}/target/config.json")
