"""The maps between a draft vocabulary and the target's, as servers read them: d2t and t2d.

Dimensions: N draft vocabulary, V target vocabulary.
"""

import numpy as np

from common.errors import EyasError
from common.safetensors import Checkpoint
from train.heads.head import Head


def vocabulary_maps(draft_ids: np.ndarray, N: int, V: int) -> tuple[np.ndarray, np.ndarray]:
    """(d2t int64 [N], t2d bool [V]): d2t[i] is the *offset* target id - i, t2d marks the draft vocabulary.

    Only a draft vocabulary smaller than the target's has maps: vLLM refuses them in a full one. EyasError
    unless `draft_ids` are N ascending ids below V.
    """
    ids = np.asarray(draft_ids, np.int64)
    if ids.shape != (N,) or (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= V:
        raise EyasError(
            f"the draft vocabulary has shape {list(ids.shape)}, expected {N} ascending ids below {V}; "
            "take the ids that the head was trained with"
        )
    t2d = np.zeros(V, np.bool_)
    t2d[ids] = True
    return ids - np.arange(N), t2d


def read_draft_ids(folder: str, tensors: Checkpoint, head: Head) -> np.ndarray:
    """The target ids int32 [N], ascending, of the draft vocabulary of the head in `folder`, whose tensors are
    these. EyasError for maps that are no such ids."""
    N, V = head.draft_vocab_size, head.vocab_size
    if "d2t" not in tensors.tensors:
        if N < V:
            raise EyasError(f"{folder} lacks d2t, the map of its {N} of {V} tokens; fetch the head again")
        return np.arange(N, dtype=np.int32)
    d2t_N = tensors.read("d2t").astype(np.int64)
    t2d_V = tensors.read("t2d").astype(bool) if "t2d" in tensors.tensors else None
    if d2t_N.shape != (N,):
        raise EyasError(f"{folder}: d2t has shape {list(d2t_N.shape)}, expected [{N}]; fetch the head again")
    return check_maps(folder, d2t_N, t2d_V, V).astype(np.int32)


def check_maps(path: str, d2t_N: np.ndarray, t2d_V: np.ndarray | None, V: int) -> np.ndarray:
    """The target ids int64 [N] of a draft vocabulary. EyasError unless d2t's offsets give ascending ids below
    V, and just those that t2d marks, where there is one."""
    N = len(d2t_N)
    ids = d2t_N + np.arange(N)
    if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= V:
        raise EyasError(
            f"{path}: d2t + [0..{N - 1}] are no ascending ids below {V} (d2t holds offsets); export it again"
        )
    if t2d_V is not None and (t2d_V.sum() != N or not np.array_equal(np.flatnonzero(t2d_V), ids)):
        raise EyasError(f"{path}: t2d marks {int(t2d_V.sum())} ids, not the {N} of d2t; export it again")
    return ids
