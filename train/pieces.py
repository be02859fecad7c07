"""Rows too long for one chip: each lies in pieces on neighbouring chips, which compute their own positions.

A chip of a group has every row of the group from its own first position on, as many as the others. Nearly all
of training is local to a position; what is not:

- **Attention.** Chips exchange positions for heads and back: each sees whole rows of its share of the heads,
  so that all have the same work wherever documents begin. Source: DeepSpeed Ulysses, arXiv 2309.14509.
- **What lies ahead.** At TTT step k an index reads the token k + 1 further on and is taught there. So a chip
  has the first positions of the next piece behind its own, the *halo*. A target there is taught by both, but
  each index drafts on its own chip only, so that no loss is counted twice.
- **A walk through an answer** (train/walk.py) needs scores of whole rows, which are gathered: they are small.

Dimensions: B rows, T positions, S pieces, t = T / S of a piece, h of the halo, L = t + h; N heads, e numbers
of each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import EyasError
from common.mesh import RULES
from train.batch import Batch
from train.targets import CHUNK

_POSITION = RULES["position"]


def require(length: int, pieces: int, steps: int, where: str) -> None:
    """EyasError unless rows of that length can be computed in so many pieces."""
    if length % pieces:
        raise EyasError(
            f"rows of {where} have {length} positions, which sp={pieces} chips can't share evenly; give an "
            "--sp that divides them, or prepare rows of another --length"
        )
    if pieces > 1 and length // pieces <= steps:
        raise EyasError(
            f"rows of {where} have {length} positions, of which each of sp={pieces} chips would have "
            f"{length // pieces}, and a rollout of ttt_steps={steps} looks {steps} ahead; give a smaller --sp"
        )


def halo(own: int, steps: int) -> int:
    """How many positions of the next piece a piece of `own` positions has behind them: those at which a
    rollout of so many steps is taught and the one that the last of them says, in whole tiles if it can be."""
    return min(own, -(-(steps + 1) // CHUNK) * CHUNK)


def spread(mask_RT: np.ndarray, pieces: int, steps: int, ahead: int = 0) -> np.ndarray:
    """bool [R, S * L]: what is set of every piece, one behind the other, and in its halo's first `ahead`
    positions; the mask itself where rows are whole."""
    if pieces == 1:
        return mask_RT
    R, own = len(mask_RT), mask_RT.shape[1] // pieces
    found = np.zeros((R, pieces, own + halo(own, steps)), bool)
    found[:, :, :own] = mask_RT.reshape(R, pieces, own)
    found[:, :-1, own : own + ahead] = found[:, 1:, :ahead]
    return found.reshape(R, -1)


def with_halo(batch: Batch, steps: int) -> Batch:
    """A chip's rows, with the halo behind their own positions; of aux states, which nothing ahead is told of,
    there are the own ones only. Behind a row's last piece there is padding.

    To be called inside a shard_map; so is all that follows.
    """
    pieces = jax.lax.axis_size(_POSITION)
    if pieces == 1:
        return batch
    size = halo(batch.aux_hidden.shape[1], steps)
    back = [(piece + 1, piece) for piece in range(pieces - 1)]

    def longer(name: str, x: Any) -> Any:
        if x is None or x.ndim < 2 or name in ("aux_hidden", "draws"):
            return x
        return jnp.concatenate([x, jax.lax.ppermute(x[:, :size], _POSITION, back)], 1)

    rows = {name: longer(name, x) for name, x in batch._asdict().items() if name != "samples"}
    return batch._replace(**rows)


def widened(x_BtX: jax.Array, length: int) -> jax.Array:
    """[B, L, ...]: zeros behind the own positions."""
    behind = length - x_BtX.shape[1]
    return jnp.pad(x_BtX, [(0, 0), (0, behind), *[(0, 0)] * (x_BtX.ndim - 2)]) if behind else x_BtX


def whole_rows(x_BtX: jax.Array) -> jax.Array:
    """[B, T, ...] of a chip's own positions."""
    return jax.lax.all_gather(x_BtX, _POSITION, axis=1, tiled=True)


def is_first() -> jax.Array:
    """bool []: whether a chip has the first piece of its rows."""
    return jax.lax.axis_index(_POSITION) == 0


def by_heads(x_BtNX: jax.Array) -> jax.Array:
    """Own positions of all heads to whole rows of a share of them, [B, T, N / S, ...]. Where they are too few
    for the chips, which those of keys and values may be, each is there several times."""
    pieces, heads = jax.lax.axis_size(_POSITION), x_BtNX.shape[2]
    x = jnp.repeat(x_BtNX, int(np.lcm(heads, pieces)) // heads, 2)
    return jax.lax.all_to_all(x, _POSITION, split_axis=2, concat_axis=1, tiled=True)


def by_positions(x_BTNX: jax.Array) -> jax.Array:
    """The inverse, [B, t, N, ...]."""
    return jax.lax.all_to_all(x_BTNX, _POSITION, split_axis=1, concat_axis=2, tiled=True)
