"""The feature store, read side: rows, features and the target's files, each compared with its checksum.

    STORE/manifest.json        what is in it, the sums of the files below; see common/manifest.py
    STORE/index.parquet        a line a conversation: id, split, row, start, length, counted
    STORE/row_sums.parquet     a line a row: the crc32c of its tokens, segment_ids, positions and loss_mask
    STORE/rows/NAME            zarr v3: tokens, segment_ids, positions, loss_mask [R, T], token_counts [V]
    STORE/features/NAME        zarr v3: states and logits [R, T, ...]
    STORE/commits/000042.json  a block of rows is durable: rows, counts, checksums; written last
    STORE/target/              the target's embed_tokens, lm_head, config.json and tokenizer files

A block without its commit marker does not exist. `common/store_writer.py` writes, `common/store_verify.py`
checks all.
"""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8_e4m3fn with numpy)
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorstore as ts

from common import kept_rows, safetensors, storage, zarr
from common.checked import Checked
from common.config import digest
from common.errors import DamagedError, EyasError
from common.manifest import COLUMNS, INDEX, MANIFEST, ROW_SUMS, read_manifest, read_marker
from common.row_cache import RowCache

_MARKER = re.compile(r"(\d{6,})\.json")
_ANEW = "which writes it anew"
_READERS = 32  # small files read at once
_REPAIR = (
    "to write a block anew, delete its file in commits/ and run the same dump command; damaged rows must be "
    "prepared anew"
)


def has_rows(url: str) -> bool:
    """True if prepare has made a store at `url`, and finished."""
    place = f"{url.rstrip('/')}/{MANIFEST}"
    return storage.exists(place) and not read_manifest(url, unfinished=True).get("unfinished")


def tensor_file(tensor: str) -> str:
    """The name in target/ of the file of "embed_tokens" or "lm_head"."""
    return f"{tensor}.safetensors"


class Store:
    """A feature store opened for reading. Whatever is wrong with it is an EyasError; no number is made up."""

    def __init__(self, url: str, manifest: dict[str, Any], cache: RowCache | None = None):
        self.url = url.rstrip("/")
        self.manifest = manifest
        self.hash = digest(manifest)
        self.rows: int = manifest["rows"]["rows"]
        self.length: int = manifest["rows"]["length"]
        self._cache, self._prefix = cache, self.hash[:32]
        self._checked = Checked(self.url, self._prefix, cache)
        self._open: dict[str, ts.TensorStore] = {}
        self._known: set[int] = set()  # blocks whose markers were read
        self._block_sums: dict[str, np.ndarray] = {}  # their sums, uint32 [R]
        self._row_sums: dict[str, np.ndarray] | None = None

    @classmethod
    def open(cls, url: str, cache: RowCache | None = None) -> "Store":
        """EyasError if `url` is no store, is damaged, or has a newer schema. `cache` keeps rows and files of
        target/ that are read."""
        return cls(url, read_manifest(url), cache)

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

    def rows_with(self, name: str) -> int:
        """Of how many rows, from the first on, the store has a feature array."""
        return self.features["arrays"][name]["shape"][0] if name in self.features["arrays"] else 0

    def arrays_in(self, block: int) -> list[str]:
        """The feature arrays that have the rows of a block."""
        start = self.block_range(block).start
        return [name for name in self.features["arrays"] if start < self.rows_with(name)]

    def marker_place(self, block: int) -> str:
        """Where a block's commit marker is."""
        return f"{self.url}/commits/{block:06d}.json"

    def committed(self) -> set[int]:
        """The blocks that have a commit marker now."""
        names = set(storage.list_names(f"{self.url}/commits"))
        found = {int(match[1]) for name in names if (match := _MARKER.fullmatch(name))}
        return {block for block in found if block < self.blocks and f"{block:06d}.json" in names}

    def missing(self) -> list[int]:
        """The blocks that have no commit marker now, ascending, from the names of the markers.

        EyasError if another manifest was in force when the first marker was written; the others are read with
        the rows of their blocks.
        """
        self.row_sums()  # there are as many rows as the manifest says
        committed = self.committed()
        if committed:
            self.commit(min(committed))
        return sorted(set(range(self.blocks)) - committed)

    def commit(self, block: int) -> dict[str, Any]:
        """A block's commit marker; EyasError if another manifest was in force when it was written."""
        place, arrays = self.marker_place(block), self.arrays_in(block)
        rows = self.block_range(block)
        return self._checked.twice(lambda: read_marker(place, self.hash, block, rows, arrays))

    def commits(self, blocks: set[int] | None = None) -> list[dict[str, Any]]:
        """The commit markers of `blocks`, or of all that are committed, in the order of the blocks."""
        with ThreadPoolExecutor(_READERS) as pool:
            markers = list(pool.map(self.commit, sorted(self.committed() if blocks is None else blocks)))
        self.row_sums()  # there are as many rows as the manifest says
        for marker in markers:
            for name, sums in marker["crc32c"].items():
                self._sums_of(name)[slice(*marker["rows"])] = sums
        self._known |= {marker["block"] for marker in markers}
        return markers

    def _sums_of(self, name: str) -> np.ndarray:
        """The crc32c of the rows of an array, uint32 [R]; of features those in blocks that are known."""
        if name in COLUMNS:
            return self.row_sums()[name]
        if name not in self._block_sums:
            self._block_sums.setdefault(name, np.zeros(self.rows, np.uint32))  # several threads read
        return self._block_sums[name]

    def require_complete(self) -> None:
        """EyasError unless every block has a commit marker."""
        missing = self.missing()
        if missing:
            raise EyasError(
                f"{self.url} is partial: {len(missing)} of {self.blocks} blocks are missing (the first is "
                f"{missing[0]}); run the same dump command again, it continues where it stopped"
            )

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
        """One line a conversation: id, split, row, start, length, counted, source (of `data`)."""
        return self._table(INDEX, {"split": pa.string(), "row": pa.int64(), "length": pa.int64()}, whole=True)

    def longest_document(self) -> int:
        """The most tokens that a conversation has."""
        return pc.max(self._table(INDEX, {"length": pa.int64()})["length"]).as_py() or 0

    def row_sums(self) -> dict[str, np.ndarray]:
        """The crc32c of every row of every array of rows, uint32 [R]."""
        if self._row_sums is None:
            table = self._table(ROW_SUMS, dict.fromkeys(COLUMNS, pa.uint32()))
            sums = {name: table[name].to_numpy() for name in COLUMNS}
            if table.num_rows != self.rows:
                raise EyasError(
                    f"{self.url}/{MANIFEST} says {self.rows} rows, {ROW_SUMS} has {table.num_rows}: one of "
                    "the two was edited; restore it or prepare a new store"
                )
            self._row_sums = sums
        return self._row_sums

    def _table(self, name: str, columns: dict[str, pa.DataType], whole: bool = False) -> pa.Table:
        return self._checked.table(name, self.manifest["rows"]["files"][name], columns, whole)

    def split_rows(self, split: str) -> np.ndarray:
        """The rows of "train" or "test", int64 ascending; a row belongs to one split."""
        table = self._table(INDEX, {"split": pa.string(), "row": pa.int64()})
        rows = np.unique(table.filter(pc.equal(table["split"], split))["row"].to_numpy()).astype(np.int64)
        self._require_rows(rows, self.rows)
        return rows

    def token_counts(self) -> np.ndarray:
        """How often each token is counted (loss mask 1) in the train split, int64 [V]."""
        rows = self.manifest["rows"]
        return self._checked.array(
            "rows/token_counts", rows["arrays"]["token_counts"], rows["token_counts_crc32"]
        )

    def draft_ids(self) -> np.ndarray | None:
        """The ids behind draft_logprobs, int32 [N] ascending; None where the codec is not `draft`."""
        codec = self.features["codec"]
        if codec["name"] != "draft":
            return None
        described = zarr.describe((codec["size"],), np.dtype(np.int32))
        return self._checked.array("features/draft_ids", described, codec["ids_crc32"])

    def read(self, names: list[str] | tuple[str, ...], rows: Any) -> dict[str, np.ndarray]:
        """{name: [n, T, ...]} in the order of `rows` (any order, repeats allowed).

        All requests are in flight at once and consecutive rows share one. bfloat16 and float8_e4m3fn come as
        the ml_dtypes of that name. EyasError for unknown names, rows outside of the store or in a block that
        is not committed, and missing or damaged chunks.
        """
        rows = np.asarray(rows, np.int64)
        self._require_rows(rows, self.rows)
        features = [name for name in names if name not in COLUMNS]
        for name in names:
            self._require_rows(rows, self._described(name)[1]["shape"][0], f"{name} of ")
        if len(rows) and features:
            self._require_committed(rows)
        return self._checked.twice(lambda: self._read(names, rows))

    def _read(self, names: list[str] | tuple[str, ...], rows: np.ndarray) -> dict[str, np.ndarray]:
        try:
            if self._cache is None:
                found = zarr.read_rows({name: self._array(name) for name in names}, rows)
            else:
                sources = {
                    name: kept_rows.Source(self._array(name), self._described(name)[1]["chunk"][0])
                    for name in names
                }
                found = kept_rows.read_rows(self._cache, self._prefix, sources, rows, self._good)
        except DamagedError as error:
            raise DamagedError(f"{self.url}: {error}; {_REPAIR}") from error
        for name in names:
            self._require_sums(name, rows, found[name])
        return found

    def _require_rows(self, rows: np.ndarray, count: int, of: str = "") -> None:
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside):
            raise EyasError(f"{self.url} has {of}rows 0 to {count - 1}; row {outside[0]} was asked for")

    def _require_committed(self, rows: np.ndarray) -> None:
        unknown = set(np.unique(rows // self.features["block_rows"]).tolist()) - self._known
        if not unknown:
            return
        try:
            self.commits(unknown)
        except EyasError as error:
            for block in sorted(unknown):
                if not storage.exists(self.marker_place(block)):
                    raise DamagedError(
                        f"{self.url} is partial: block {block} is not committed; run the same dump command "
                        "again, it continues where it stopped"
                    ) from error
            raise

    def _good(self, name: str, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Of which rows these values have the sums that the store has, bool [n]."""
        return self._sums_of(name)[rows] == np.array(zarr.row_sums(values), np.uint32)

    def _require_sums(self, name: str, rows: np.ndarray, values: np.ndarray) -> None:
        bad = rows[~self._good(name, rows, values)].tolist()
        if bad:
            raise DamagedError(
                f"{self.url}: {name} rows {zarr.some(bad)}: damaged on disk (checksums differ); {_REPAIR}"
            )

    def row_bytes(self, name: str) -> int:
        """The bytes of a row of an array."""
        _, described = self._described(name)
        return math.prod(described["shape"][1:]) * np.dtype(described["dtype"]).itemsize

    def _described(self, name: str) -> tuple[str, dict[str, Any]]:
        """(folder, the manifest's entry) of an array [R, T, ...]."""
        arrays = {n: ("rows", self.manifest["rows"]["arrays"][n]) for n in COLUMNS}
        if name not in arrays:
            arrays |= {n: ("features", array) for n, array in self.features["arrays"].items()}
        if name not in arrays:
            raise EyasError(f"{self.url} has no array {name}; it has {', '.join(arrays)}")
        return arrays[name]

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._open:
            section, described = self._described(name)
            self._open[name] = zarr.open_array(f"{self.url}/{section}/{name}", described, indices=True)
        return self._open[name]

    def target_file(self, name: str) -> bytes:
        """A file of target/. EyasError if it is not the one that dump wrote."""
        place = storage.join(f"{self.url}/target", name)
        wanted = self.features["target_files"].get(name)
        if wanted is None:
            raise EyasError(
                f"{place} is not of this store; it has {', '.join(self.features['target_files'])}"
            )
        damaged = f"{place} is damaged (its checksum differs); run the same dump command, {_ANEW}"
        return self._checked.file(place, wanted, damaged)

    def target_tensor(self, name: str) -> np.ndarray:
        """The target's "embed_tokens" or "lm_head", [V, H] in its own dtype; one and the same where tied.

        EyasError if its file is missing or not the one that dump wrote.
        """
        name = name if tensor_file(name) in self.features["target_files"] else "embed_tokens"
        return safetensors.from_bytes(self.target_file(tensor_file(name)))[name]

    def target_config(self) -> dict[str, Any]:
        """The target's config.json. EyasError if it is not the one that dump wrote."""
        return json.loads(self.target_file("config.json"))
