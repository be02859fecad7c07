"""Attention of a few new positions to everything that a cache holds of their sequences.

Dimensions: B sequences, m new positions of each, N query heads, J key/value heads, G = N // J, d of queries
and keys, e of values; S places of a block of the cache, M of a tree.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.layers import MASKED, einsum

BLOCK = 256  # positions of the cache that are read at once


class Tree(NamedTuple):
    """Places of a cache, from `starts` on, that hold a tree of drafts behind a sequence."""

    starts_B: jax.Array
    depths_BM: jax.Array  # place starts + j is of position starts + depth
    sees_BmM: jax.Array  # bool: place starts + j is the new position's own, or leads to it


class New(NamedTuple):
    """New positions of sequences, and where in their cache they lie. Without a tree a place is a position."""

    positions_Bm: jax.Array
    places_Bm: jax.Array
    tree: Tree | None = None

    @classmethod
    def behind(cls, starts_B: jax.Array, count: int) -> "New":
        """The next `count` positions of each sequence."""
        positions_Bm = starts_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
        return cls(positions_Bm, positions_Bm)

    def last(self) -> jax.Array:
        """The last place that any of them sees."""
        if self.tree is None:
            return self.places_Bm.max()
        return self.tree.starts_B.max() + self.tree.depths_BM.shape[1] - 1

    def sees(self, places_S: jax.Array, window: int | None) -> jax.Array:
        """bool [B, m, S]: which of these places each of them sees."""
        if self.tree is None:
            apart_BmS = self.positions_Bm[..., None] - places_S[None, None]
            seen_BmS = apart_BmS >= 0
        else:
            starts_B, depths_BM, sees_BmM = self.tree
            into_BS = places_S[None] - starts_B[:, None]
            at_BS = jnp.clip(into_BS, 0, depths_BM.shape[1] - 1)
            leads_BmS = jnp.take_along_axis(sees_BmM, at_BS[:, None], 2) & (into_BS == at_BS)[:, None]
            seen_BmS = leads_BmS | (into_BS < 0)[:, None]
            inside_BS = starts_B[:, None] + jnp.take_along_axis(depths_BM, at_BS, 1)
            positions_BS = jnp.where(into_BS < 0, places_S[None], inside_BS)
            apart_BmS = self.positions_Bm[..., None] - positions_BS[:, None]
        return seen_BmS if window is None else seen_BmS & (apart_BmS < window)


def attend_to_cache(
    q_BmNd: jax.Array,
    read: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    length: int,
    new: New,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k) v [B, m, N, e] over the cache's places up to each query's own.

    `read(start, S)` gives keys [B, S, J, d] and values [B, S, J, e] of the cache's `length` places, the
    queries' own among them; what lies behind a query may be anything finite. `window` and `sinks_N` are those
    of common.attention.attend. Blocks behind all queries, or before all windows, are not read; a sequence's
    result does not depend, to the last bit, on which blocks the others need.
    """
    S = min(BLOCK, length)
    keys, values = jax.eval_shape(lambda: read(jnp.int32(0), S))
    (B, m, N, d), J = q_BmNd.shape, keys.shape[2]
    q_BJGmd = q_BmNd.reshape(B, m, J, N // J, d).transpose(0, 2, 3, 1, 4)
    last = jnp.minimum(new.last(), length - 1) // S
    first = 0 if window is None else jnp.maximum(new.positions_Bm.min() - window + 1, 0) // S

    def of_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        start = jnp.minimum(j * S, length - S)  # the last block may begin within the one before
        k_BSJd, v_BSJe = read(start, S)
        s = einsum("bjgmd,bsjd->bjgms", q_BJGmd, k_BSJd) * scale
        places_S = start + jnp.arange(S, dtype=jnp.int32)
        seen_BmS = new.sees(places_S, window) & (places_S >= j * S)[None, None]
        s = jnp.where(seen_BmS[:, None, None], s, MASKED)
        peak = jnp.maximum(top, s.max(-1, keepdims=True))
        p, fade = jnp.exp(s - peak), jnp.exp(top - peak)
        mixed = einsum("bjgms,bsje->bjgme", p.astype(v_BSJe.dtype), v_BSJe)
        return peak, total * fade + p.sum(-1, keepdims=True), out * fade + mixed

    zero = jnp.zeros((B, J, N // J, m, 1), jnp.float32)
    top, total = zero + MASKED, zero
    if sinks_N is not None:
        top, total = zero + sinks_N.astype(jnp.float32).reshape(1, J, N // J, 1, 1), zero + 1
    empty = jnp.zeros((*zero.shape[:-1], values.shape[-1]), jnp.float32)
    _, total, out = jax.lax.fori_loop(first, last + 1, of_block, (top, total, empty))
    return (out / total).transpose(0, 3, 1, 2, 4).reshape(B, m, N, -1).astype(q_BmNd.dtype)
