"""Live indices among all positions of packed rows, for rollouts whose step k sees step 0's keys of its
document up to an index, and the index's own ones of steps 1..k.

Queries, and what follows them, run on the live indices of train/targets.py, which are in their places where
they are all positions; keys and values of step 0 on all positions. Of rows in pieces (train/pieces.py) a chip
computes its own positions and, for nothing, the few of the halo; step 0's keys and values are those of whole
rows of some heads.

Dimensions: B rows, T positions, n = B * T, C live indices in B rows of m or one of C, K steps, N query heads,
J key/value heads, d head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.attention import attend
from train import pieces
from train.batch import Batch
from train.heads.own_keys import KeysValues, join
from train.targets import ahead, permute, slots


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["live", "slot", "turns", "positions_BT", "segments_BT"],
    meta_fields=["own"],
)
@dataclass(frozen=True)
class Places:
    """Where positions and live indices are."""

    live: jax.Array | None  # int32 [C]; None where they are all positions
    slot: jax.Array | None  # int32 [K + n], the inverse, behind K places that are free
    turns: Any  # of the live indices at every step, [K, B, m, ...]
    positions_BT: jax.Array
    segments_BT: jax.Array  # of whole rows
    own: int  # how many of a row's T positions are not of the halo

    def turns_at(self, k: jax.Array) -> Any:
        """Those of a step, [B, m, ...]."""
        return jax.tree.map(lambda x: x[k], self.turns)


def places(batch: Batch, steps: int, turns: Callable[[jax.Array], Any]) -> Places:
    """Those of a chip's rows. `turns` gives what is needed of positions [K, B, m], such as the tables by
    which queries are turned."""
    C, n = len(batch.live), batch.tokens.size
    positions_BT, step_K11 = batch.positions, jnp.arange(steps, dtype=jnp.int32)[:, None, None]
    segments_BT, own = batch.segment_ids, batch.aux_hidden.shape[1]
    if own < positions_BT.shape[1]:
        segments_BT = pieces.whole_rows(segments_BT[:, :own])
    rows = positions_BT, segments_BT, own
    if n == C:
        return Places(None, None, turns(positions_BT[None] + step_K11), *rows)
    turned = turns(positions_BT.reshape(-1).at[batch.live].get(mode="clip")[None, None] + step_K11)
    slot = jnp.concatenate([jnp.full((steps,), C, jnp.int32), slots(batch.live, n)])
    return Places(batch.live, slot, turned, *rows)


def of_live(at: Places, x_n: jax.Array) -> jax.Array:
    """[n, ...] -> [C, ...]"""
    return x_n if at.live is None else permute(x_n, at.live, at.slot[-len(x_n) :])


def everywhere(at: Places, x_C: jax.Array) -> jax.Array:
    """[C, ...] -> [n, ...], zeros where an index is not live."""
    return x_C if at.live is None else permute(x_C, at.slot[-at.positions_BT.size :], at.live)


@jax.custom_vjp
def ahead_by(by: jax.Array, x_n: jax.Array) -> jax.Array:
    """x[i + by] at i; behind the last, where nothing counts, the first. Its gradient is moved back."""
    return jnp.roll(x_n, -by, 0)


ahead_by.defvjp(lambda by, x_n: (ahead_by(by, x_n), by), lambda by, g_n: (None, jnp.roll(g_n, by, 0)))


def of_tokens(at: Places, k: jax.Array, x_nY: jax.Array) -> jax.Array:
    """[C, Y] of the tokens that the live indices take at step k."""
    by, n = ahead(k), len(x_nY)
    if at.live is None:
        return ahead_by(by, x_nY)
    # the index that reads a position is `by` before it
    inverse = jax.lax.dynamic_slice_in_dim(at.slot, len(at.slot) - n - by, n)
    return permute(x_nY, at.live + by, inverse)


def first_keys(at: Places, made: KeysValues, head_dim: int) -> KeysValues:
    """Step 0's keys and values [n, J * d] as queries read them: of whole rows, of some heads where a chip has
    pieces of them."""
    if at.own == at.positions_BT.shape[1]:
        return made

    def whole(x: jax.Array) -> jax.Array:
        own = x.reshape(*at.positions_BT.shape, -1, head_dim)[:, : at.own]
        return pieces.by_heads(own).reshape(at.segments_BT.size, -1)

    return whole(made[0]), whole(made[1])


def read(at: Places, k: jax.Array, first: KeysValues, own: KeysValues, q_BmNd: jax.Array) -> jax.Array:
    """What the live indices' queries read [C, N * d] of step 0's keys of all positions and of their own ones
    [K, C, J * d] of steps 1..k."""
    (B, T), scale = at.positions_BT.shape, q_BmNd.shape[-1] ** -0.5
    if at.live is None:
        return join(scale, *_attended(at, first, q_BmNd), q_BmNd, own, k)
    q_BTNd = everywhere(at, q_BmNd[0]).reshape(B, T, *q_BmNd.shape[2:])
    found = (of_live(at, x.reshape(B * T, *x.shape[2:]))[None] for x in _attended(at, first, q_BTNd))
    return join(scale, *found, q_BmNd, own, k)


def read_first(at: Places, first: KeysValues, q_BTNd: jax.Array) -> jax.Array:
    """What queries of all positions read of step 0's keys, [n, N * d]."""
    return _attended(at, first, q_BTNd)[0].reshape(at.positions_BT.size, -1)


def _attended(at: Places, first: KeysValues, q_BTNd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what queries of all positions read of step 0's keys [B, T, N, d], logsumexp [B, T, N] of their
    logits)."""
    (_, T), d = at.positions_BT.shape, q_BTNd.shape[-1]
    k, v = (x.reshape(*at.segments_BT.shape, -1, d) for x in first)
    if at.own == T:
        return attend(q_BTNd, k, v, at.segments_BT, d**-0.5, return_lse=True)
    q = pieces.by_heads(q_BTNd[:, : at.own])
    found = attend(q, k, v, at.segments_BT, d**-0.5, return_lse=True)
    read, lse = (pieces.widened(pieces.by_positions(x), T) for x in found)
    return read, lse
