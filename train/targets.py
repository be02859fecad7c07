"""Which positions a batch has to compute: found on the host from masks alone, at static capacities.

Two facts of TTT make most of a prompt's work needless: a query of step k sees only step 0's keys and its own
index, so an index that never predicts a counted token needs keys and nothing else; and a target position is
shared by all K steps, so its teacher is needed once.

Index i at step k predicts token i+2+k; its teacher is the target's output at position j = i+1+k.
"""

from dataclasses import dataclass

import numpy as np

PAD_TO = 128  # capacities are multiples of this, a matmul tile


@dataclass(frozen=True)
class Capacity:
    """Static sizes of one data shard's compacted work: live query indices and counted target positions."""

    live: int
    targets: int


def counted_targets(
    segments_RT: np.ndarray, loss_mask_RT: np.ndarray, compat: str | None = None
) -> np.ndarray:
    """bool [R, T]: teacher positions j whose next token j+1 belongs to an answer of the same document.

    `compat="specforge"` reproduces that trainer's mask, which is not moved at step 0: position j counts when
    the token *before* it, j-1, is masked in.
    """
    counted = np.zeros(loss_mask_RT.shape, bool)
    same = (segments_RT[:, 1:] == segments_RT[:, :-1]) & (segments_RT[:, 1:] > 0)
    if compat == "specforge":
        counted[:, 1:] = same & (loss_mask_RT[:, :-1] > 0)
    else:
        counted[:, :-1] = same & (loss_mask_RT[:, 1:] > 0)
    return counted


def live_queries(segments_RT: np.ndarray, counted_RT: np.ndarray, steps: int) -> np.ndarray:
    """bool [R, T]: indices i with a counted target among positions i+1 .. i+steps of their document."""
    live = np.zeros(counted_RT.shape, bool)
    for ahead in range(1, min(steps, live.shape[1] - 1) + 1):
        same = segments_RT[:, ahead:] == segments_RT[:, :-ahead]
        live[:, :-ahead] |= counted_RT[:, ahead:] & same
    return live


def round_up(count: int) -> int:
    """The smallest multiple of PAD_TO that holds `count`, at least one tile."""
    return max(1, -(-count // PAD_TO)) * PAD_TO


def compact(mask_RT: np.ndarray, shards: int, capacity: int) -> np.ndarray:
    """int32 [shards * capacity]: flat indices of the set positions within each shard of rows, ascending.

    Free places hold the shard's number of positions, which every gather reads as zeros.
    """
    flat = mask_RT.reshape(shards, -1)
    out = np.full((shards, capacity), flat.shape[1], np.int32)
    for shard in range(shards):
        (found,) = np.nonzero(flat[shard])
        assert len(found) <= capacity, (len(found), capacity)
        out[shard, : len(found)] = found
    return out.reshape(-1)
