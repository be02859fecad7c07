"""Causal attention inside the documents of packed rows, block of queries by block of queries.

Dimensions: B rows, T positions, N query heads, K key/value heads, G = N // K, D head_dim of queries and
keys, E head_dim of values (and of the output), Q queries of a block, S keys that a block can see.
"""

import jax
import jax.numpy as jnp

from common.layers import einsum

BLOCK = 512  # queries a block: scores of [B, N, BLOCK, S] are the largest thing held
_MASKED = -1e30  # finite: a row that is masked everywhere gives no NaN


def attend(
    q_BTND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKE: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(scale * q k) v [B, T, N, E] over earlier-or-equal positions of the same segment.

    `window`: only the latest `window` keys, the query's own included. `sinks_N`: a logit a head that takes
    part in the softmax and carries no value. `softcap`: logits become softcap * tanh(logits / softcap).
    """
    B, T, N, D = q_BTND.shape
    K = k_BTKD.shape[2]
    q = q_BTND.reshape(B, T, K, N // K, D).transpose(0, 2, 3, 1, 4)
    k, v = k_BTKD.transpose(0, 2, 1, 3), v_BTKE.transpose(0, 2, 1, 3)
    sinks = None if sinks_N is None else sinks_N.reshape(1, K, N // K, 1).astype(jnp.float32)
    outs = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = 0 if window is None else max(0, start + 1 - window)
        s = _scores(q[:, :, :, start:stop], k[:, :, first:stop], scale, softcap)
        mask = _mask(segments_BT, start, stop, first, window)
        p, total = _exponentials(jnp.where(mask, s, _MASKED), sinks)
        out = _values(p.astype(v.dtype), v[:, :, first:stop]) / total[..., None]
        outs.append(out.astype(q_BTND.dtype))
    out_BKGTE = jnp.concatenate(outs, axis=3)
    return out_BKGTE.transpose(0, 3, 1, 2, 4).reshape(B, T, N, v_BTKE.shape[-1])


def _scores(q_BKGQD: jax.Array, k_BKSD: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Unmasked float32 scores [B, K, G, Q, S]; the heads that share keys go into one matmul."""
    B, K, G, Q, D = q_BKGQD.shape
    s = einsum("bkqd,bksd->bkqs", q_BKGQD.reshape(B, K, G * Q, D), k_BKSD).reshape(B, K, G, Q, -1)
    return s * scale if softcap is None else softcap * jnp.tanh(s * (scale / softcap))


def _mask(segments_BT: jax.Array, start: int, stop: int, first: int, window: int | None) -> jax.Array:
    """True [B, 1, 1, Q, S] where a query of start..stop may see a key of first..stop."""
    apart_QS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None]
    seen_QS = apart_QS >= 0 if window is None else (apart_QS >= 0) & (apart_QS < window)
    same_BQS = segments_BT[:, start:stop, None] == segments_BT[:, None, first:stop]
    return (same_BQS & seen_QS[None])[:, None, None]


def _exponentials(s: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(exp(s - max), their sum with the sink's)."""
    top = s.max(-1) if sinks is None else jnp.maximum(s.max(-1), sinks)
    p = jnp.exp(s - top[..., None])
    total = p.sum(-1)
    return p, total if sinks is None else total + jnp.exp(sinks - top)


def _values(p_BKGQS: jax.Array, v_BKSE: jax.Array) -> jax.Array:
    B, K, G, Q, S = p_BKGQS.shape
    return einsum("bkqs,bkse->bkqe", p_BKGQS.reshape(B, K, G * Q, S), v_BKSE).reshape(B, K, G, Q, -1)
