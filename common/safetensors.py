"""Safetensors folders: headers are validated before anything is read, tensors are read slice by slice.

Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, raw little-endian
data). A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`. Works on local
folders and on any fsspec URL. Pickled weights are never opened.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from common import storage, strict_json
from common.errors import EyasError, RestartError
from common.library_errors import library_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # how the names of pickled weights end
_HEADER_LIMIT = 100_000_000  # bytes, as the reference implementation has it
_LARGEST, _AXES = 2**53, 32  # no number of a header is larger, no tensor has more axes
_READERS = 16  # headers of shards read at once
_PIECE = 8 << 20  # bytes of a local file read at once where only columns are wanted

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
FLOATS = tuple(DTYPES[kind] for kind in ("F32", "BF16", "F16"))


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `offset` is its first byte in the file `url`."""

    url: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    file: tuple[int, ...] = ()  # which file of that name it is, on a disk

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of one safetensors folder by name; `read` takes slices of them."""

    def __init__(self, folder: str, tensors: dict[str, Tensor]):
        self.folder = folder
        self.tensors = tensors

    @classmethod
    def open(cls, folder: str) -> "Checkpoint":
        """Reads and validates every header. EyasError for missing, truncated or malformed files, for an
        index that names a missing shard, a tensor its shard lacks, or a file outside of the folder.
        """
        names = _shards(folder)
        with ThreadPoolExecutor(_READERS) as pool:
            headers = list(pool.map(lambda name: _header(storage.join(folder, name)), names))
        tensors: dict[str, Tensor] = {}
        for header in headers:
            if twice := sorted(tensors.keys() & header.keys()):
                raise EyasError(f"{folder}: two of its shards have {twice[0]}; fetch the model again")
            tensors |= header
        if storage.exists(f"{folder.rstrip('/')}/{INDEX}"):
            for name, shard in _index(folder).items():
                if name not in tensors:
                    raise EyasError(
                        f"{folder}: {INDEX} puts {name} into {shard}, which lacks it; fetch it again"
                    )
        return cls(folder, tensors)

    def require(self, name: str, shape: tuple[int, ...], dtypes: tuple[np.dtype, ...] = FLOATS) -> Tensor:
        """The tensor `name`; EyasError if it is missing or has another shape or dtype."""
        found = self.tensors.get(name)
        if found is None:
            raise EyasError(f"{self.folder} lacks the tensor {name} {list(shape)}; fetch the model again")
        if found.shape != shape:
            raise EyasError(
                f"{self.folder}: {name} has shape {list(found.shape)}, but config.json asks for "
                f"{list(shape)}; the two are not of one model: fetch both again"
            )
        if found.dtype not in dtypes:
            kinds = ", ".join(d.name for d in dtypes)
            raise EyasError(
                f"{self.folder}: {name} is {found.dtype.name}, but config.json asks for {kinds}; "
                "its quantization_config is of another model: fetch both again"
            )
        return found

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A copy of `tensor[index]`; only the bytes of the needed rows (dimension 0) are fetched.

        Slices have step 1. Raises EyasError when the file ends early.
        """
        tensor = self.tensors[name]
        bounds = [s.indices(n) for s, n in zip(index, tensor.shape, strict=False)]
        if not tensor.shape:
            return np.frombuffer(_fetch(tensor, 0, tensor.nbytes), tensor.dtype).reshape(())
        first, last = bounds[0][:2] if bounds else (0, tensor.shape[0])
        row = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
        rest = tuple(slice(start, stop) for start, stop, _ in bounds[1:])
        rows = (last - first, *tensor.shape[1:])
        if not storage.is_remote(tensor.url):
            return _read_local(tensor, tensor.offset + first * row, rows, (slice(None), *rest))
        data = _fetch(tensor, first * row, last * row)
        return np.frombuffer(data, tensor.dtype).reshape(rows)[(slice(None), *rest)].copy()


def _read_local(tensor: Tensor, start: int, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """`rows[index]` of the rows `shape` that begin at byte `start` of a local file, some megabytes at a time.

    They are read and not mapped: a mapped file that is cut off meanwhile, or whose disk fails, ends the
    process without a word.
    """
    found = np.empty(np.broadcast_to(False, shape)[index].shape, tensor.dtype)
    whole, row = found.shape == shape, math.prod(shape[1:]) * tensor.dtype.itemsize
    step = max(1, shape[0] if whole else _PIECE // max(1, row))
    with library_errors(tensor.url, "read"), open(storage.local_path(tensor.url), "rb") as file:
        if _which(os.fstat(file.fileno())) != tensor.file:
            raise RestartError(f"{tensor.url} was changed while it was read; run the same command again")
        file.seek(start)
        for first in range(0, shape[0], step):
            here = slice(first, min(first + step, shape[0]))
            piece = found if whole else np.empty((here.stop - first, *shape[1:]), tensor.dtype)
            if file.readinto(piece.reshape(-1).view(np.uint8)) != piece.nbytes:
                raise EyasError(_early(tensor))
            if not whole:
                found[here] = piece[index]
    return found


def _which(about: os.stat_result) -> tuple[int, ...]:
    return about.st_ino, about.st_size, about.st_mtime_ns


def _file(url: str) -> tuple[int, ...]:
    """Which file of that name is there now; of a bucket, where a replaced one cannot be told, nothing."""
    if storage.is_remote(url):
        return ()
    with library_errors(url, "read"):
        return _which(os.stat(storage.local_path(url)))


def _early(tensor: Tensor) -> str:
    return f"{tensor.url} ends early; fetch it again"


def _fetch(tensor: Tensor, start: int, stop: int) -> bytes:
    """Bytes start..stop of a tensor's data."""
    data = storage.read_bytes(tensor.url, tensor.offset + start, tensor.offset + stop)
    if len(data) != stop - start:
        raise EyasError(_early(tensor))
    return data


def _shards(folder: str) -> list[str]:
    """File names of a folder's shards."""
    base = folder.rstrip("/")
    names = storage.list_names(folder)
    if INDEX in names:
        shards = sorted(set(_index(folder).values()))
        for shard in shards:
            storage.join(folder, shard)
        missing = [shard for shard in shards if shard not in names and not storage.exists(f"{base}/{shard}")]
        if missing:
            raise EyasError(
                f"{folder}: {INDEX} names {missing[0]} ({len(missing)} of {len(shards)} shards missing); "
                "fetch the model again"
            )
        return shards
    if SINGLE in names:
        return [SINGLE]
    pickled = [name for name in names if name.endswith(PICKLES)]
    if pickled:
        raise EyasError(
            f"{folder} has pickled weights ({pickled[0]}), which are never opened; convert to safetensors"
        )
    raise EyasError(f"{folder} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")


def _index(folder: str) -> dict[str, str]:
    weight_map = storage.read_object(f"{folder.rstrip('/')}/{INDEX}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise EyasError(f"{folder}/{INDEX} has no weight_map of names to files; fetch it again")
    for shard in weight_map.values():
        if not shard.endswith(".safetensors"):
            raise EyasError(f"{folder}: {INDEX} names {shard}; only .safetensors files are read, convert it")
    return weight_map


def _header(url: str) -> dict[str, Tensor]:
    """The validated header of one file."""
    size, file = storage.size(url), _file(url)
    length = int.from_bytes(storage.read_bytes(url, 0, 8) if size >= 8 else b"", "little")
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise EyasError(f"{url} is no safetensors file or was cut off in its header; fetch it again")
    header = strict_json.parse(storage.read_bytes(url, 8, 8 + length), f"the safetensors header of {url}")
    if not isinstance(header, dict):
        raise EyasError(f"{url} has a damaged safetensors header; fetch it again")
    header.pop("__metadata__", None)
    tensors = {name: _entry(url, name, entry, 8 + length, size, file) for name, entry in header.items()}
    _refuse_overlaps(url, tensors)
    return tensors


def _entry(url: str, name: str, entry: object, base: int, size: int, file: tuple[int, ...]) -> Tensor:
    """One header entry, checked against the file's size."""
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore
        numbers = (*shape, start, stop)
    except (TypeError, KeyError, ValueError):
        raise EyasError(f"{url}: the header entry of {name} is damaged; fetch it again") from None
    if not isinstance(kind, str) or kind not in DTYPES:
        raise EyasError(f"{url}: {name} has dtype {kind!r}; known are {', '.join(DTYPES)}")
    whole = all(type(n) is int and 0 <= n <= _LARGEST for n in numbers)
    if not isinstance(shape, list) or len(shape) > _AXES or not whole:
        raise EyasError(f"{url}: {name} has a shape or place that is no list of numbers; fetch it again")
    tensor = Tensor(url, DTYPES[kind], tuple(shape), base + start, file)
    if stop - start != tensor.nbytes:
        raise EyasError(f"{url}: {name} {kind} {shape} does not fit its {stop - start} bytes; fetch it again")
    if base + stop > size:
        raise EyasError(
            f"{url} was cut off: {name} ends at byte {base + stop}, the file at {size}; fetch it again"
        )
    return tensor


def _refuse_overlaps(url: str, tensors: dict[str, Tensor]) -> None:
    """EyasError if two tensors share bytes: one of the two entries lies."""
    placed = sorted((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
    for (_, stop, first), (start, _, second) in pairwise(placed):
        if start < stop:
            raise EyasError(f"{url}: {first} and {second} share bytes; the header is damaged: fetch it again")


def to_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, the same for the same arguments; `metadata` gets format "pt", which says that
    linear weights are [out, in]: transformers refuses a file without it."""
    data = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    made = safetensors.numpy.save(data, {"format": "pt"} | (metadata or {}))
    return _ordered(made) if metadata else made


def _ordered(made: bytes) -> bytes:
    """The file with its metadata by name: the library writes them in another order each time."""
    start = 8 + int.from_bytes(made[:8], "little")
    header = json.loads(made[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(made)[start:]])


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file that `to_bytes` made."""
    return {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(data)
    }


def write(path: str, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes one safetensors file atomically, as `to_bytes` makes it."""
    storage.write_bytes(path, to_bytes(tensors, metadata))
