"""A trained head as a folder that servers load, in one of the layouts of train/servers.py."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by name)
import numpy as np

from common import params as declared
from common import safetensors
from common.errors import EyasError
from common.folders import write_folder
from common.storage import is_remote, local_path
from common.store import Store, tensor_file
from train.draft_maps import vocabulary_maps
from train.heads.head import Head
from train.servers import PORTABLE
from train.serving_config import DTYPES

TRAINED_FOR = "trained_for"  # a key of config.json that no server looks at
WEIGHTS = "model.safetensors"
MADE = "made"  # an entry of model.safetensors' metadata, as JSON


def target_identity(store: Store) -> dict[str, str]:
    """The name of a store's target, and the sum of the embedding that its heads take from it."""
    features = store.features
    return {
        "target": features["target"]["name"],
        "embed_tokens": features["target_files"][tensor_file("embed_tokens")],
    }


def export(
    folder: str,
    params: Mapping[str, Any],
    head: Head,
    draft_ids: np.ndarray,
    target_config: dict[str, Any],
    dtype: str = "bfloat16",
    metadata: Mapping[str, Any] | None = None,
    trained_for: Mapping[str, str] | None = None,
    layout: str = PORTABLE,
    verifier: str = "",
    embedding: np.ndarray | None = None,
) -> str:
    """Writes config.json, model.safetensors and README.md whole or not at all; returns the path or URL.

    `params` is {name: [out, in] array} as `head.parameters()` declares it; `draft_ids` the target ids of the
    draft vocabulary, ascending integers [N]; `target_config` the target's HF config.json; `metadata` what
    the model card tells of the head (target, store, step, acceptance length); `trained_for` what
    `target_identity` says, by which a warm start knows the target again. `verifier` (the target's folder or
    Hub id) and `embedding` (its embed_tokens [V, H], kept in its dtype) are for layouts that hold them.
    EyasError, before anything is written, for arrays that are not this head's or not finite, a head that does
    not fit the target, and a folder that is not an earlier export.
    """
    if dtype not in DTYPES:
        raise EyasError(f"dtype {dtype!r} cannot be served; choose one of {', '.join(DTYPES)}")
    declared.check(head.parameters(), dict(params), "the head")
    head.require_fit(target_config, "the head")
    cast = {name: _cast(name, params[name], dtype) for name in head.parameters()}
    tensors = {name: cast[source] for name, source in head.tensors(layout).items()}
    tensors |= _beside(head, layout, draft_ids, embedding)
    config = head.serving_config(target_config, dtype, layout, verifier)
    if trained_for:
        config[TRAINED_FOR] = dict(trained_for)
    made = dict(metadata or {})
    about = {MADE: json.dumps(made, default=str)}
    write_folder(
        folder,
        {
            WEIGHTS: safetensors.to_bytes(tensors, about),
            "README.md": head.card(made, target_config, layout).encode(),
            "config.json": (json.dumps(config, indent=2, allow_nan=False) + "\n").encode(),  # the last
        },
    )
    return folder if is_remote(folder) else local_path(folder)


def _beside(
    head: Head, layout: str, draft_ids: np.ndarray, embedding: np.ndarray | None
) -> dict[str, np.ndarray]:
    wanted = head.beside(layout)
    d2t, t2d = vocabulary_maps(draft_ids, head.draft_vocab_size, head.vocab_size)
    known = {"d2t": d2t, "t2d": t2d, "embed_tokens.weight": embedding}
    found = {name: known[name] for name in wanted if known[name] is not None}
    declared.check(wanted, found, f"what the layout {layout} takes of the target")
    return found


def _cast(name: str, value: Any, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
        array = np.ascontiguousarray(np.asarray(value).astype(dtype))
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise EyasError(
            f"{name} has {bad} values that are not finite in {dtype}; export an earlier checkpoint, "
            "or in a wider dtype"
        )
    return array
