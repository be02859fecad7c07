"""Everything about a dump that can be known, and refused, before a weight is read or a byte written."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common import zarr
from common.codec import CODECS, PRECISIONS, Codec, shapes
from common.config import digest
from common.draft_vocab import most_frequent
from common.errors import EyasError
from common.mesh import make_mesh
from common.safetensors import Checkpoint
from common.storage import require_room
from common.store import Store
from common.store_writer import describe_arrays, raw_bytes, refuse_other_features
from dump import target
from dump.chat import tokenizer_hash

_DTYPES = ("float32", "bfloat16")
_CHIP_TOKENS = 2048  # of a batch by default: a few seconds on a laptop, enough to fill a matrix unit
_SAMPLED = 512  # tensors whose first bytes go into the hash of the weights
_OVERHEAD = 1.02  # bytes on disk over raw bytes, at most
_SAVE = "use --precision float8_e4m3fn, another --logits, or another disk"


@dataclass(frozen=True)
class DumpConfig:
    """What to dump. `model` is a Hugging Face folder, `store` a store that prepare has made.

    logits: none, topk, draft or full (see common/codec.py); topk: its k; draft_vocab: size of `draft`'s
    vocabulary (the most frequent counted tokens of the train split); dtype: what the target computes in
    (None: float32 on CPU, bfloat16 on accelerators); precision: what states are stored in (None: dtype);
    aux_layers: h_k terms (None: the default of every server); block_rows: rows of a shard, the unit of
    resuming; batch_rows: rows of a forward pass (None: about 2,048 tokens a chip); dp, tp: the mesh; experts:
    what of them is divided over tp, `ffn` their columns or `expert` whole ones (None: the family's own);
    dequantise: float8 and MXFP4 weights become plain at load (twice to four times the memory, the same
    results).
    """

    model: str
    store: str
    logits: str = "none"
    topk: int = 64
    draft_vocab: int = 32_000
    precision: str | None = None
    dtype: str | None = None
    aux_layers: tuple[int, ...] | None = None
    block_rows: int = 32
    batch_rows: int | None = None
    dp: int = 1
    tp: int = 1
    experts: str | None = None
    dequantise: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("logits", CODECS),
            ("precision", (None, *PRECISIONS)),
            ("dtype", (None, *_DTYPES)),
            ("experts", (None, "ffn", "expert")),
        ):
            if getattr(self, field) not in allowed:
                known = ", ".join(str(value) for value in allowed if value)
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown; use one of {known}")
        for field in ("topk", "draft_vocab", "block_rows", "dp", "tp"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        self.batch(1)

    def batch(self, length: int) -> int:
        """Rows of a forward pass over rows of `length` tokens: a multiple of dp*tp, a part of block_rows."""
        chips = self.dp * self.tp
        if self.block_rows % chips:
            raise ValueError(f"block_rows={self.block_rows} must be a multiple of dp*tp={chips}")
        if self.batch_rows is not None:
            if self.batch_rows < 1 or self.batch_rows % chips or self.block_rows % self.batch_rows:
                raise ValueError(
                    f"batch_rows={self.batch_rows} must be a multiple of dp*tp={chips} that divides "
                    f"block_rows={self.block_rows}"
                )
            return self.batch_rows
        wanted = max(1, _CHIP_TOKENS // length)
        share = self.block_rows // chips
        return chips * max(n for n in range(1, share + 1) if share % n == 0 and n <= wanted)


@dataclass(frozen=True)
class Plan:
    """A checked dump. `features` is the manifest's section, `blocks` those without a commit marker."""

    config: DumpConfig
    store: Store
    target: target.TargetConfig
    mesh: Mesh
    dtype: str
    aux_layers: tuple[int, ...]
    codec: Codec
    draft_ids: np.ndarray | None
    features: dict[str, Any]
    blocks: tuple[int, ...]
    bytes: int  # of the blocks that are missing, on disk


def make_plan(config: DumpConfig) -> Plan:
    """Checks everything; writes nothing. EyasError names what is wrong."""
    store = Store.open(config.store)
    cfg = target.read_config(config.model, config.experts, config.dequantise)
    _check_rows_fit(config, store, cfg)
    aux_layers = config.aux_layers or target.default_aux_layers(cfg.num_layers)
    target.check_aux_layers(cfg, aux_layers)
    target.check_length(cfg, store.length)
    try:
        mesh = make_mesh(config.dp, config.tp)
    except ValueError as error:
        raise EyasError(str(error)) from None
    target.check(config.model, cfg, config.tp)
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    codec, draft_ids = _codec(replace(config, precision=config.precision or dtype), store, cfg.vocab_size)
    features = {
        "target": _describe_target(config.model, cfg),
        "aux_layers": list(aux_layers),
        "last_hidden": "after_final_norm",
        "codec": {"name": codec.name, "size": codec.size}
        | ({} if draft_ids is None else {"ids_crc32": zarr.crc32(draft_ids)}),
        "precision": codec.precision,
        "compute_dtype": dtype,
        "block_rows": config.block_rows,
        "arrays": describe_arrays(shapes(codec, store.rows, store.length, len(aux_layers), cfg.hidden_size)),
    }
    blocks = _missing_blocks(config.store, features)
    need = _bytes(features, store.rows, len(blocks))
    require_room(config.store, need, "the features", _SAVE)
    return Plan(config, store, cfg, mesh, dtype, tuple(aux_layers), codec, draft_ids, features, blocks, need)


def _check_rows_fit(config: DumpConfig, store: Store, cfg: target.TargetConfig) -> None:
    """EyasError unless the rows were made with this model's tokenizer."""
    rows = store.manifest["rows"]
    if rows["vocab_size"] != cfg.vocab_size:
        raise EyasError(
            f"{config.store} has rows for a vocabulary of {rows['vocab_size']}, {config.model} has "
            f"{cfg.vocab_size}; prepare a store with this model"
        )
    found = tokenizer_hash(config.model)
    if rows.get("tokenizer_hash") != found:
        raise EyasError(
            f"the rows of {config.store} were made with another tokenizer "
            f"({str(rows.get('tokenizer_hash'))[:12]}) than that of {config.model} ({found[:12]}); prepare a "
            "store with this model"
        )


def _codec(config: DumpConfig, store: Store, vocab_size: int) -> tuple[Codec, np.ndarray | None]:
    size = {"topk": config.topk, "draft": config.draft_vocab, "full": vocab_size, "none": 0}[config.logits]
    if size > vocab_size:
        field = "topk" if config.logits == "topk" else "draft_vocab"
        raise EyasError(f"{field}={size}, but the target has {vocab_size} tokens; give fewer")
    ids = most_frequent(store.token_counts(), size) if config.logits == "draft" else None
    return Codec(config.logits, size, config.precision), ids


def _describe_target(folder: str, cfg: target.TargetConfig) -> dict[str, Any]:
    return {
        "name": os.path.basename(os.path.normpath(folder)),
        "architecture": cfg.architecture,
        "config_hash": digest(cfg.raw),
        "weights_hash": weights_hash(Checkpoint.open(folder)),
        "hidden_size": cfg.hidden_size,
        "vocab_size": cfg.vocab_size,
        "layers": cfg.num_layers,
    }


def weights_hash(checkpoint: Checkpoint) -> str:
    """sha256 (hex) of all names, dtypes and shapes, and of the first row of up to 512 tensors.

    Two fine-tunes of one model differ in it, at the price of a few megabytes read.
    """
    names = sorted(checkpoint.tensors)
    table = [[n, checkpoint.tensors[n].dtype.name, checkpoint.tensors[n].shape] for n in names]
    found = hashlib.sha256(json.dumps(table).encode())
    for name in names[:: -(-len(names) // _SAMPLED)]:
        first = (slice(0, 1),) * len(checkpoint.tensors[name].shape[:1])
        found.update(checkpoint.read(name, first).tobytes())
    return found.hexdigest()


def _missing_blocks(url: str, features: dict[str, Any]) -> tuple[int, ...]:
    """The blocks to compute; EyasError if the store was dumped otherwise."""
    store = Store.open(url)
    done = set()
    if refuse_other_features(url, features):
        done = {marker["block"] for marker in store.commits()}
    blocks = -(-store.rows // features["block_rows"])
    return tuple(sorted(set(range(blocks)) - done))


def _bytes(features: dict[str, Any], rows: int, blocks: int) -> int:
    share = min(rows, blocks * features["block_rows"]) / rows
    return int(raw_bytes(features["arrays"]) * share * _OVERHEAD)
