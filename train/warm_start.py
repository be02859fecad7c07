"""A published head, read from its safetensors, to be trained on.

Dimensions: N draft vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common import storage, zarr
from common.config import digest
from common.errors import EyasError, RestartError
from common.folders import read_as_one
from common.safetensors import FLOATS, Checkpoint
from common.store import Store
from train.draft_maps import read_draft_ids
from train.export import TRAINED_FOR, target_identity
from train.heads.head import HEADS, Head

_EMBEDDING = ("embed_tokens.weight", "model.embed_tokens.weight")
_COMPARED = 16  # rows of an embedding, spread over the vocabulary


@dataclass(frozen=True)
class Published:
    """A checked head in `folder`. `draft_ids` int32 [N] ascending; `sums` tell its content from any other."""

    folder: str
    head: Head
    draft_ids: np.ndarray
    sums: dict[str, Any]
    _tensors: Checkpoint
    _sources: dict[str, str]

    def weights(self) -> dict[str, np.ndarray]:
        """{parameter: float32 array}. EyasError for one that is not finite."""
        return {name: self._read(name) for name in self.head.parameters()}

    def _read(self, name: str) -> np.ndarray:
        found = self._tensors.read(self._sources[name])
        if zarr.crc32(found) != self.sums["tensors"][name]:
            raise RestartError(f"{self.folder} was replaced while it was read; run the same command again")
        found = found.astype(np.float32)
        if not np.isfinite(found).all():
            raise EyasError(f"{self.folder}: {self._sources[name]} has values that are not finite")
        return found


def open_published(folder: str, kind: str, store: Store) -> Published:
    """EyasError, by the name of what differs, for a folder without a head of this kind, and for one of
    another target. RestartError if it was replaced meanwhile."""
    with read_as_one(folder):
        return _open(folder, kind, store)


def _open(folder: str, kind: str, store: Store) -> Published:
    place = storage.join(folder, "config.json")
    if not storage.exists(place):
        raise EyasError(
            f"init={folder} holds no config.json; name fitted, target, normal, or a head's folder"
        )
    config, target = storage.read_object(place), store.target_config()
    head = _head(place, config, kind, target["num_hidden_layers"])
    _require_target(place, config, store)
    head.require_fit(target, folder)
    tensors = Checkpoint.open(folder)
    sources = head.sources(tensors.tensors, folder)
    for name, declared in head.parameters().items():
        tensors.require(sources[name], declared.shape, FLOATS)
    _require_embedding(folder, tensors, store)
    ids = read_draft_ids(folder, tensors, head)
    sums = {name: zarr.crc32(tensors.read(source)) for name, source in sources.items()}
    return Published(folder, head, ids, {"config": digest(config), "tensors": sums}, tensors, sources)


def _head(place: str, config: dict[str, Any], kind: str, num_target_layers: int) -> Head:
    if not HEADS[kind].is_published(config):
        others = [name for name, other in HEADS.items() if other.is_published(config)]
        advice = f"give --kind {' or '.join(others)}" if others else f"known kinds are {', '.join(HEADS)}"
        raise EyasError(
            f"{place}: architectures is {config.get('architectures')!r}, of no head of kind={kind}; {advice}"
        )
    try:
        return HEADS[kind].from_published(place, config, num_target_layers)
    except EyasError:  # which names the place itself
        raise
    except ValueError as error:
        raise EyasError(f"{place}: {error}; give another head") from error


def _require_target(place: str, config: dict[str, Any], store: Store) -> None:
    """EyasError if the head says itself that it was trained for another target."""
    known, its = config.get(TRAINED_FOR), target_identity(store)
    if isinstance(known, dict) and known.get("embed_tokens") != its["embed_tokens"]:
        raise EyasError(
            f"{place} was trained for {known.get('target')}, but {store.url} holds features of "
            f"{its['target']}; give a store of the same target, or another head"
        )


def _require_embedding(folder: str, tensors: Checkpoint, store: Store) -> None:
    """EyasError if the head brings an embedding along that is not its target's, to bfloat16's precision."""
    name = next((name for name in _EMBEDDING if name in tensors.tensors), None)
    if name is None:
        return
    its = store.target_tensor("embed_tokens")
    tensors.require(name, its.shape, FLOATS)
    for row in np.unique(np.linspace(0, len(its) - 1, _COMPARED, dtype=int)):
        ours = tensors.read(name, (slice(row, row + 1),)).astype(np.float32)
        if not np.allclose(ours, its[row : row + 1].astype(np.float32), rtol=2**-7, atol=1e-6):
            raise EyasError(
                f"{folder}: row {row} of its {name} is not that of {target_identity(store)['target']}, the "
                f"target of {store.url}; give a store of the head's target"
            )
