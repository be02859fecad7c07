"""A trained head as the portable folder that SGLang, sglang-jax, EAGLE and vLLM load.

Dimensions: N draft vocabulary, V target vocabulary.
"""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16 by name)
import numpy as np
from safetensors.numpy import save

from common import params as declared
from common.errors import EyasError
from common.storage import is_remote, local_path, write_folder
from train.heads import Head
from train.serving_config import DTYPES


def export(
    folder: str,
    params: Mapping[str, Any],
    head: Head,
    draft_ids: np.ndarray,
    target_config: dict[str, Any],
    dtype: str = "bfloat16",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Writes config.json, model.safetensors and README.md whole or not at all; returns the path or URL.

    `params` is {name: [out, in] array} as `head.parameters()` declares it; `draft_ids` the target ids of the
    draft vocabulary, ascending integers [N]; `target_config` the target's HF config.json; `metadata` what
    the model card tells of the head (target, store, step, acceptance length). EyasError, before anything is
    written, for arrays that are not this head's or not finite, a head that does not fit the target, and a
    folder that is not an earlier export.
    """
    if dtype not in DTYPES:
        raise EyasError(f"dtype {dtype!r} cannot be served; choose one of {', '.join(DTYPES)}")
    declared.check(head.parameters(), dict(params), "the head")
    head.require_fit(target_config, "the head")
    cast = {name: _cast(name, params[name], dtype) for name in head.parameters()}
    tensors = {name: cast[source] for name, source in head.tensors().items()}
    if head.draft_vocab_size < head.vocab_size:
        tensors["d2t"], tensors["t2d"] = vocabulary_maps(draft_ids, head)
    config = head.serving_config(target_config, dtype)
    write_folder(
        folder,
        {
            # "pt" says that linear weights are [out, in]; transformers refuses a file without it.
            "model.safetensors": save(tensors, metadata={"format": "pt"}),
            "README.md": head.card(metadata or {}).encode(),
            "config.json": (json.dumps(config, indent=2, allow_nan=False) + "\n").encode(),  # the last
        },
    )
    return folder if is_remote(folder) else local_path(folder)


def vocabulary_maps(draft_ids: np.ndarray, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """(d2t int64 [N], t2d bool [V]): d2t[i] is the *offset* target id - i, t2d marks the draft vocabulary.

    Only a draft vocabulary smaller than the target's has maps: vLLM refuses them in a full one. EyasError
    unless `draft_ids` are N ascending ids below V.
    """
    ids = np.asarray(draft_ids, np.int64)
    N, V = head.draft_vocab_size, head.vocab_size
    if ids.shape != (N,) or (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= V:
        raise EyasError(
            f"the draft vocabulary has shape {list(ids.shape)}, expected {N} ascending ids below {V}; "
            "take the ids that the head was trained with"
        )
    t2d = np.zeros(V, np.bool_)
    t2d[ids] = True
    return ids - np.arange(N), t2d


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
