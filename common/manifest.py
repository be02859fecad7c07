"""What a store's manifest and commit markers hold, checked where they are read.

    STORE/manifest.json        {"schema", "rows", "features"}: what is in the store
    STORE/commits/000042.json  a block of rows is durable

The manifest is made once, only where there is none, before the rows are written; `unfinished` says that they
are not complete. `features` is put into it once, before the first feature. Whoever comes second finds it and
continues what it says, or is refused; nothing that it names is ever deleted.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from common import schema, storage
from common.channels import decode_channels
from common.config import INT8, digest
from common.errors import EyasError
from common.schema import Count, Crc32, FileName, NotRequired, Sha256, Size, TypedDict

SCHEMA = 2
MANIFEST = "manifest.json"
INDEX = "index.parquet"
ROW_SUMS = "row_sums.parquet"
COLUMNS = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "uint8"}  # [R, T]
_LAST = ("last_hidden", "last_scale")  # which may be of the first blocks alone
_LARGEST = 2**60  # bytes of an array
_ITEM = {"int64": 8, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1}
_ITEM |= {"uint8": 1}
_RESTORE = "it was edited or cut off: restore it"
_DELETE = "delete it and run the same dump command"


class Array(TypedDict):
    """A zarr array: its sizes, those of its inner chunks and of its shards."""

    shape: Annotated[list[Size], Field(min_length=1, max_length=6)]
    dtype: Literal["int64", "int32", "float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8"]
    chunk: list[Size]
    shard: list[Size]


class Prepared(TypedDict):
    """How rows were made; `data` are names without folders."""

    data: NotRequired[list[str]]


class Rows(TypedDict):
    """Rows, their tokens T, the target's vocabulary V; sums of the files and of token_counts [V]."""

    rows: Size
    length: Size
    vocab_size: Size
    arrays: dict[FileName, Array]
    files: dict[FileName, Sha256]
    token_counts_crc32: Crc32
    tokenizer_hash: NotRequired[Sha256]
    config: NotRequired[Prepared]


class Target(TypedDict):
    """Which model the features are of."""

    name: str
    architecture: str
    config_hash: Sha256
    weights_hash: NotRequired[Sha256]
    hidden_size: Size
    vocab_size: Size
    layers: Size


class StoredCodec(TypedDict):
    """common/codec.py's Codec; `ids_crc32` is that of features/draft_ids."""

    name: Literal["none", "topk", "draft", "full"]
    size: Count
    ids_crc32: NotRequired[Crc32]


class Features(TypedDict):
    """What a dump writes; `target_files` are the sums of target/, `channels` as common/channels.py has them,
    of the states that are stored, where those are int8."""

    target: Target
    aux_layers: Annotated[list[Count], Field(min_length=1)]
    codec: StoredCodec
    precision: Literal["float32", "bfloat16", "float8_e4m3fn", "int8"]
    channels: NotRequired[dict[Literal["aux_hidden", "last_hidden"], list[str]]]
    block_rows: Size
    arrays: Annotated[dict[FileName, Array], Field(min_length=1)]
    target_files: dict[FileName, Sha256]


class Manifest(TypedDict):
    """The whole file."""

    rows: Rows
    features: NotRequired[Features]
    unfinished: NotRequired[Literal[True]]


class Marker(TypedDict):
    """A committed block: its first row and the one behind its last, counts of tokens, a crc32c of each row of
    every array; `sha256` is that of the marker's other fields."""

    store: Sha256
    block: Count
    rows: Annotated[list[Count], Field(min_length=2, max_length=2)]
    tokens: Count
    counted: Count
    crc32c: dict[FileName, list[Crc32]]
    sha256: Sha256


def read_manifest(url: str, unfinished: bool = False) -> dict[str, Any]:
    """The manifest of a store, of rows that are not complete only if `unfinished`.

    EyasError if there is none, it is damaged, its sizes disagree, or another Eyas wrote it.
    """
    place = f"{url.rstrip('/')}/{MANIFEST}"
    if not storage.exists(place):
        raise EyasError(f"{url} is no feature store (it has no {MANIFEST}); check the path or run prepare")
    manifest = storage.read_json(place)
    number = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise EyasError(f"{place} has no schema number, so it is no store's manifest; check the path")
    if number > SCHEMA:
        raise EyasError(f"{url} has schema {number}, newer than {SCHEMA}, which this Eyas reads; update Eyas")
    if number < SCHEMA:
        raise EyasError(
            f"{url} has schema {number}, older than {SCHEMA}, which this Eyas reads; make another store with "
            "prepare and dump"
        )
    schema.check(Manifest, manifest, place, _RESTORE)
    _check_sizes(place, manifest)
    _hash(place, manifest)
    if manifest.get("unfinished") and not unfinished:
        raise EyasError(f"{url} has no complete rows: prepare was stopped; run the same command again")
    return manifest


def _check_sizes(place: str, manifest: dict[str, Any]) -> None:
    """EyasError where two sizes disagree, or one is beyond every disk."""
    rows, features = manifest["rows"], manifest.get("features", {})
    R, T, V = rows["rows"], rows["length"], rows["vocab_size"]
    wanted = {f"rows.arrays.{name}": ([R, T], dtype) for name, dtype in COLUMNS.items()}
    wanted["rows.arrays.token_counts"] = ([V], "int64")
    found = {f"rows.arrays.{name}": array for name, array in rows["arrays"].items()}
    if features:
        target, stored = features["target"], features["arrays"]
        sizes = {"aux_hidden": [len(features["aux_layers"]), target["hidden_size"]]}
        sizes["last_hidden"] = [target["hidden_size"]]
        _check_channels(place, features, {name: sizes[name] for name in stored if name in sizes})
        first = _first_rows(place, features, R)
        for name, array in stored.items():
            rest = sizes.get(name, array["shape"][2:])
            dtype = features["precision"] if name in sizes else array["dtype"]
            count = first if name in _LAST else R
            wanted[f"features.arrays.{name}"] = ([count, T, *rest], dtype)
            shard = array["shard"]
            _expect(place, f"features.arrays.{name}.shard's dimensions", len(shard), 2 + len(rest))
            parts = [math.gcd(shard[0], features["block_rows"]), math.gcd(shard[1], T), *rest]
            _expect(place, f"features.arrays.{name}.shard", shard, parts)  # a block is whole shards
        found |= {f"features.arrays.{name}": array for name, array in stored.items()}
        _expect(place, "features.target.vocab_size", target["vocab_size"], V)
        codec = features["codec"]
        _expect(place, "features.codec.ids_crc32", "ids_crc32" in codec, codec["name"] == "draft")
    _expect(place, "the arrays", sorted(found), sorted(wanted))
    for name, (shape, dtype) in wanted.items():
        array = found[name]
        _expect(place, name, [array["shape"], array["dtype"]], [shape, dtype])
        _expect(place, f"{name}.chunk's dimensions", len(array["chunk"]), len(shape))
        if math.prod(shape) * _ITEM[dtype] > _LARGEST:
            raise EyasError(f"{place}: {name} {shape} is larger than any disk; {_RESTORE}")
    _expect(place, "rows.files", sorted(rows["files"]), [INDEX, ROW_SUMS])


def _first_rows(place: str, features: dict[str, Any], R: int) -> int:
    """Of how many rows the last state is. EyasError unless they are whole blocks."""
    if _LAST[0] not in features["arrays"]:
        return R
    found = features["arrays"][_LAST[0]]["shape"][0]
    if found > R or (found < R and found % features["block_rows"]):
        raise EyasError(
            f"{place}: features.arrays.{_LAST[0]} is of {found} rows, no whole blocks; {_RESTORE}"
        )
    return found


def _check_channels(place: str, features: dict[str, Any], states: dict[str, list[int]]) -> None:
    """EyasError unless the states that need scales of channels, and no others, have them."""
    found, field = features.get("channels", {}), "features.channels"
    _expect(place, f"{field}' names", sorted(found), sorted(states) if features["precision"] == INT8 else [])
    try:
        decode_channels(found, {name: tuple(shape) for name, shape in states.items()})
    except ValueError as error:
        raise EyasError(f"{place}: {field} are no scales ({error}); {_RESTORE}") from None


def _expect(place: str, field: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise EyasError(f"{place}: {field} is {found}, but the other fields ask for {wanted}; {_RESTORE}")


def _hash(place: str, value: dict[str, Any]) -> str:
    try:
        return digest(value)
    except (ValueError, RecursionError):
        raise EyasError(f"{place} holds a number that is none, or too many levels; {_RESTORE}") from None


def make_marker(
    store: str, block: int, rows: range, tokens: int, counted: int, sums: dict[str, list[int]]
) -> dict[str, Any]:
    """The commit marker of a block; `store` is the hash of the manifest in force."""
    marker = {
        "store": store,
        "block": block,
        "rows": [rows.start, rows.stop],
        "tokens": tokens,
        "counted": counted,
        "crc32c": sums,
    }
    return marker | {"sha256": digest(marker)}


def read_marker(place: str, store: str, block: int, rows: range, arrays: list[str]) -> dict[str, Any]:
    """A block's commit marker. EyasError if it is not whole, not this block's, or not of this manifest."""
    marker = schema.read(Marker, place, _DELETE)
    if marker["store"] != store:
        raise EyasError(
            f"{place} was written under another manifest: {MANIFEST} was edited since; restore it"
        )
    sums = marker["crc32c"]
    wanted = {name: len(rows) for name in arrays}
    for field, found, expected in (
        ("block", marker["block"], block),
        ("rows", marker["rows"], [rows.start, rows.stop]),
        ("sums", {name: len(of) for name, of in sums.items()}, wanted),
        ("sha256", marker["sha256"], _hash(place, {k: v for k, v in marker.items() if k != "sha256"})),
    ):
        if found != expected:
            raise EyasError(f"{place} is not block {block}'s: {field} {found}, not {expected}; {_DELETE}")
    return marker
