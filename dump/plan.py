"""Everything about a dump that can be known, and refused, before a weight is read or a byte written."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common import pod, zarr
from common.channels import decode_channels
from common.codec import Codec, shapes
from common.config import digest, to_json
from common.draft_vocab import most_frequent
from common.errors import EyasError
from common.fit_size import fit_rows
from common.layers import compute_dtype
from common.mesh import make_mesh
from common.safetensors import Checkpoint
from common.storage import require_room
from common.store import Store
from common.store_writer import describe_arrays, find_features, raw_bytes
from dump import target
from dump.config import DumpConfig
from dump.tokenizer_files import tokenizer_hash

_SAMPLED = 512  # tensors whose first bytes go into the hash of the weights
_SMALL_OBJECT = 2_000_000  # bytes: a request to a bucket takes as long as writing these
_OVERHEAD = 1.02  # bytes on disk over raw bytes, at most
_SAVE = "use --precision int8, another --logits or --last-hidden, or another disk"


@dataclass(frozen=True)
class Plan:
    """A checked dump. `features` is the manifest's section, but for the sums of target/ and the scales of
    channels where no dump has begun; `blocks` are those of its share that have no commit marker, the same on
    every process. What the configuration left open (dtype, aux layers) is chosen."""

    config: DumpConfig
    store: Store
    target: target.TargetConfig
    mesh: Mesh
    codec: Codec
    draft_ids: np.ndarray | None
    features: dict[str, Any]
    batch_rows: int  # of a forward pass, over all chips
    blocks: tuple[int, ...]
    bytes: int  # of these blocks, on disk

    @property
    def finds_channels(self) -> bool:
        """Whether the store needs scales of channels, and has none yet."""
        return bool(self._channels) and "channels" not in self.features

    @property
    def computes(self) -> bool:
        """Whether the target is needed."""
        return bool(self.blocks) or self.finds_channels

    @property
    def _channels(self) -> dict[str, tuple[int, ...]]:
        return self.codec.channels(len(self.config.aux_layers), self.target.hidden_size)

    def channels(self, features: dict[str, Any]) -> dict[str, np.ndarray]:
        """The scales that a store's section has, by the names of the states."""
        return decode_channels(features.get("channels", {}), self._channels)

    def rows_of(self, block: int) -> range:
        """The rows of a block; the last one may be short."""
        size = self.config.block_rows
        return range(block * size, min((block + 1) * size, self.store.rows))


def make_plan(config: DumpConfig) -> Plan:
    """Checks everything; writes nothing. EyasError, on every process, names what is wrong."""
    with pod.together():
        store = Store.open(config.store)
        store.row_sums()  # there are as many rows as the manifest says
        cfg = target.read_config(config.model, config.experts, config.dequantise)
        _check_rows_fit(config, store, cfg)
        aux_layers = config.aux_layers or target.default_aux_layers(cfg.num_layers)
        target.check_aux_layers(cfg, aux_layers)
        target.check_length(cfg, store.length)
        _check_documents_fit(config, store, cfg)
        mesh = make_mesh(config.dp, config.tp)
        target.check(config.model, cfg, config.tp)
        dtype = compute_dtype(config.dtype)
        config = replace(config, dtype=dtype, aux_layers=tuple(aux_layers))
        codec, draft_ids = _codec(config, store, cfg)
        batch_rows = _batch_rows(config, store.length, mesh)
        described = _describe_target(config.model, cfg)
    _require_same(config, store, described)
    # One process looks at what is there, and the others are told: it may change while they look.
    features, blocks = pod.told(lambda: _begun(config, store, described, codec, draft_ids))
    plan = Plan(
        config=config,
        store=store,
        target=cfg,
        mesh=mesh,
        codec=codec,
        draft_ids=draft_ids,
        features=features,
        batch_rows=batch_rows,
        blocks=tuple(blocks),
        bytes=_bytes(features, store.rows, len(blocks)),
    )
    with pod.together():
        require_room(config.store, plan.bytes, "the features", _SAVE)
    return plan


def _require_same(config: DumpConfig, store: Store, described: dict[str, Any]) -> None:
    """EyasError unless all processes dump the same. Folders may have other names on other hosts."""
    options = to_json(replace(config, model="-", store="-"))
    rows = {"sums of its rows": digest(store.manifest["rows"])}
    pod.require_same(options | {"version of jax": jax.__version__}, "options")
    pod.require_same(rows | {name: value for name, value in described.items() if name != "name"}, "files")


def _begun(
    config: DumpConfig,
    store: Store,
    described: dict[str, Any],
    codec: Codec,
    draft_ids: np.ndarray | None,
) -> tuple[dict[str, Any], list[int]]:
    """(the manifest's section, the store's own where a dump has begun; the blocks to compute)."""
    features = {
        "target": described,
        "aux_layers": list(config.aux_layers),
        **({} if codec.last_rows == 0 else {"last_hidden": "after_final_norm"}),
        "codec": {"name": codec.name, "size": codec.size}
        | ({} if draft_ids is None else {"ids_crc32": zarr.crc32(draft_ids)}),
        "precision": codec.precision,
        "compute_dtype": config.dtype,
        "block_rows": config.block_rows,
        "arrays": describe_arrays(
            shapes(codec, store.rows, store.length, len(config.aux_layers), described["hidden_size"]),
            config.block_rows,
        ),
    }
    begun = find_features(config.store, features)
    if begun is None:
        _check_objects(config, store.length, features["arrays"])
    blocks = (
        range(-(-store.rows // config.block_rows)) if begun is None else Store.open(config.store).missing()
    )
    part, parts = config.part()
    return begun or features, [block for block in blocks if block % parts == part]


def _check_objects(config: DumpConfig, T: int, arrays: dict[str, Any]) -> None:
    """EyasError if an array's rows are too large for an object, and T has no parts to cut them into."""
    for name, array in arrays.items():
        part = array["shard"][1]
        size = math.prod(array["shard"]) * np.dtype(array["dtype"]).itemsize
        if part < T and size < _SMALL_OBJECT:
            raise EyasError(
                f"{config.store}: a row of {name} would be {T // part:,} objects of {size / 1e6:.2f} MB, as "
                f"{T} tokens have no larger equal parts; prepare with --length {-(-T // 256) * 256}"
            )


def _batch_rows(config: DumpConfig, length: int, mesh: Mesh) -> int:
    try:
        return config.batch(length, *Counter(chip.process_index for chip in mesh.devices.flat).values())
    except ValueError as error:
        raise EyasError(str(error)) from None


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


def _check_documents_fit(config: DumpConfig, store: Store, cfg: target.TargetConfig) -> None:
    """EyasError if a document has more tokens than the positions that the target is made for. Rows may be
    longer: positions restart in every document."""
    longest, limit = store.longest_document(), positions_limit(cfg.text)
    if limit is not None and longest > limit:
        raise EyasError(
            f"{config.store} has a document of {longest} tokens, but {config.model} is made for {limit} "
            f"(max_position_embeddings of its config.json); prepare with --length {limit} or less"
        )


def positions_limit(text: dict[str, Any]) -> int | None:
    """How many positions a config.json promises, None where it says nothing. A YaRN file may state them
    before the extension or after it; a linear one states them before."""
    limit = text.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    scaling = dict(text.get("rope_scaling") or {}) | dict(text.get("rope_parameters") or {})
    kind, factor = scaling.get("rope_type") or scaling.get("type"), scaling.get("factor") or 1
    if kind == "yarn":
        return max(limit, int(factor * (scaling.get("original_max_position_embeddings") or limit)))
    return int(factor * limit) if kind == "linear" else limit


def _codec(config: DumpConfig, store: Store, cfg: target.TargetConfig) -> tuple[Codec, np.ndarray | None]:
    vocab_size = cfg.vocab_size
    size = {"topk": config.topk, "draft": config.draft_vocab, "full": vocab_size, "none": 0}[config.logits]
    if size > vocab_size:
        field = "topk" if config.logits == "topk" else "draft_vocab"
        raise EyasError(f"{field}={size}, but the target has {vocab_size} tokens; give fewer")
    ids = most_frequent(store.token_counts(), size) if config.logits == "draft" else None
    last_rows = {"all": None, "none": 0}.get(config.last_hidden)
    if config.last_hidden == "first":
        last_rows = _fitted_rows(config, store, cfg)
    return Codec(config.logits, size, config.precision, last_rows), ids


def _fitted_rows(config: DumpConfig, store: Store, cfg: target.TargetConfig) -> int:
    """Of how many rows, in whole blocks, a start that is fitted wants the last state."""
    targets = np.full(store.rows, store.token_counts().sum() / store.rows)  # on average
    rows = fit_rows(targets, store.length, (len(config.aux_layers) + 1) * cfg.hidden_size)
    return -(-rows // config.block_rows) * config.block_rows


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


def _bytes(features: dict[str, Any], rows: int, blocks: int) -> int:
    share = min(rows, blocks * features["block_rows"]) / rows
    return int(raw_bytes(features["arrays"]) * share * _OVERHEAD)
