"""Attention of a few new positions to everything that a cache holds of their sequences.

Dimensions: B sequences, m new positions of each, N query heads, J key/value heads, G = N // J, d of queries
and keys, e of values; S positions of a block of the cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.layers import einsum

BLOCK = 256  # positions of the cache that are read at once
_MASKED = -1e30  # finite: a query that sees nothing of a block gives no NaN


def attend_to_cache(
    q_BmNd: jax.Array,
    read: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    length: int,
    positions_Bm: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(scale * q k) v [B, m, N, e] over the cache's positions up to each query's own.

    `read(start, S)` gives keys [B, S, J, d] and values [B, S, J, e] of the cache's `length` positions, the
    queries' own among them; what lies behind a query may be anything finite. `window`, `sinks_N` and
    `softcap` are those of common.attention.attend. Blocks behind all queries, or before all windows, are not
    read; a sequence's result does not depend, to the last bit, on which blocks the others need.
    """
    S = min(BLOCK, length)
    keys, values = jax.eval_shape(lambda: read(jnp.int32(0), S))
    (B, m, N, d), J = q_BmNd.shape, keys.shape[2]
    q_BJGmd = q_BmNd.reshape(B, m, J, N // J, d).transpose(0, 2, 3, 1, 4)
    last = jnp.minimum(positions_Bm.max(), length - 1) // S
    first = 0 if window is None else jnp.maximum(positions_Bm.min() - window + 1, 0) // S

    def of_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        start = jnp.minimum(j * S, length - S)  # the last block may begin within the one before
        k_BSJd, v_BSJe = read(start, S)
        s = einsum("bjgmd,bsjd->bjgms", q_BJGmd, k_BSJd) * scale
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        numbers_S = start + jnp.arange(S, dtype=jnp.int32)
        apart_BmS = positions_Bm[..., None] - numbers_S[None, None]
        seen_BmS = (apart_BmS >= 0) & (numbers_S >= j * S)[None, None]
        if window is not None:
            seen_BmS &= apart_BmS < window
        s = jnp.where(seen_BmS[:, None, None], s, _MASKED)
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        p, fade = jnp.exp(s - new), jnp.exp(top - new)
        mixed = einsum("bjgms,bsje->bjgme", p.astype(v_BSJe.dtype), v_BSJe)
        return new, total * fade + p.sum(-1, keepdims=True), out * fade + mixed

    zero = jnp.zeros((B, J, N // J, m, 1), jnp.float32)
    top, total = zero + _MASKED, zero
    if sinks_N is not None:
        top, total = zero + sinks_N.astype(jnp.float32).reshape(1, J, N // J, 1, 1), zero + 1
    empty = jnp.zeros((*zero.shape[:-1], values.shape[-1]), jnp.float32)
    _, total, out = jax.lax.fori_loop(first, last + 1, of_block, (top, total, empty))
    return (out / total).transpose(0, 3, 1, 2, 4).reshape(B, m, N, -1).astype(q_BmNd.dtype)
