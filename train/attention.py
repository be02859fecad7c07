"""Causal attention inside documents that also returns its logsumexp, so that more keys can join later.

TTT attends from every step to the same keys of step 0. Scores are recomputed in the backward pass, and keys
behind a block of queries are never touched. Rows are a loop, not a batch: XLA then holds the scores of one
row's blocks, where it would hold those of all rows and all K steps at once.

Dimensions: B rows, T positions, N query heads, K key/value heads, G = N // K, D head_dim; Q queries of a
block, S keys up to its end.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common.layers import einsum

KEPT = "attended"  # names what a jax.checkpoint around attend should keep
BLOCK = 256  # queries a block: large enough for a full matmul, small enough to skip half of the keys
_MASKED = -1e30  # finite, so that a fully masked row gives no NaN


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q_BTND: jax.Array, k_BTKD: jax.Array, v_BTKD: jax.Array, segments_BT: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, D], logsumexp [B, T, N] float32) of softmax(scale * q k) v over earlier-or-equal
    positions of the same segment. Formula of the backward pass: FlashAttention (arXiv 2205.14135), with the
    logsumexp's own cotangent added.
    """
    return _forward(q_BTND, k_BTKD, v_BTKD, segments_BT, scale)[0]


def _forward(q_BTND, k_BTKD, v_BTKD, segments_BT, scale):
    inputs = q_BTND, k_BTKD, v_BTKD, segments_BT
    out, lse = jax.lax.map(lambda row: _row(*row, scale), inputs)
    out, lse = (checkpoint_name(x, KEPT) for x in (out, lse))
    return (out, lse), (*inputs, out, lse)


def _backward(scale, saved, cotangents):
    return *jax.lax.map(lambda row: _row_back(*row, scale), (*saved, *cotangents)), None


attend.defvjp(_forward, _backward)


def _grouped(x_TND: jax.Array, kv_heads: int) -> jax.Array:
    """[T, N, D] -> [K, G, T, D]: the heads that share keys lie together."""
    T, N, D = x_TND.shape
    return x_TND.reshape(T, kv_heads, N // kv_heads, D).transpose(1, 2, 0, 3)


def _ungrouped(x_KGTD: jax.Array) -> jax.Array:
    K, G, T, D = x_KGTD.shape
    return x_KGTD.transpose(2, 0, 1, 3).reshape(T, K * G, D)


def _blocks(T: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _scores(q_KGTD, k_KTD, segments_T, block: slice, scale: float) -> jax.Array:
    """Masked float32 scores [K, G, Q, S] of a block's queries."""
    q_KGQD, k_KSD = q_KGTD[:, :, block], k_KTD[:, : block.stop]
    K, G, Q, D = q_KGQD.shape
    s = einsum("kqd,ksd->kqs", q_KGQD.reshape(K, G * Q, D), k_KSD).reshape(K, G, Q, block.stop)
    causal_QS = jnp.arange(block.stop)[None] <= jnp.arange(block.start, block.stop)[:, None]
    same_QS = segments_T[block, None] == segments_T[None, : block.stop]
    return jnp.where((causal_QS & same_QS)[None, None], s * scale, _MASKED)


def _row(q_TND, k_TKD, v_TKD, segments_T, scale):
    """(out [T, N, D], logsumexp [T, N]) of one row."""
    K = k_TKD.shape[1]
    q, k, v = _grouped(q_TND, K), k_TKD.transpose(1, 0, 2), v_TKD.transpose(1, 0, 2)
    outs, lses = [], []
    for block in _blocks(len(segments_T)):
        s = _scores(q, k, segments_T, block, scale)
        top = s.max(-1)
        e = jnp.exp(s - top[..., None])
        total = e.sum(-1)
        flat = e.astype(v.dtype).reshape(K, -1, block.stop)
        out = einsum("kqs,ksd->kqd", flat, v[:, : block.stop]).reshape(*s.shape[:3], -1)
        outs.append((out / total[..., None]).astype(q.dtype))
        lses.append(top + jnp.log(total))
    lse = jnp.concatenate(lses, axis=2)
    return _ungrouped(jnp.concatenate(outs, axis=2)), _ungrouped(lse[..., None])[..., 0]


def _row_back(q_TND, k_TKD, v_TKD, segments_T, out_TND, lse_TN, g_out_TND, g_lse_TN, scale):
    """The cotangents of q, k and v of one row."""
    T, K, D = k_TKD.shape
    q, g, lse = _grouped(q_TND, K), _grouped(g_out_TND, K), _grouped(lse_TN[..., None], K)
    k, v = k_TKD.transpose(1, 0, 2), v_TKD.transpose(1, 0, 2)
    # d s = p * (d p - sum(out * d out) + d lse)
    shift = (g_out_TND.astype(jnp.float32) * out_TND.astype(jnp.float32)).sum(-1) - g_lse_TN
    shift = _grouped(shift[..., None], K)
    dqs, dk, dv = [], jnp.zeros((K, T, D), jnp.float32), jnp.zeros((K, T, D), jnp.float32)
    for block in _blocks(T):
        p = jnp.exp(_scores(q, k, segments_T, block, scale) - lse[:, :, block])
        flat = K, -1, D
        q_part, g_part = q[:, :, block].reshape(flat), g[:, :, block].reshape(flat)
        dp = einsum("kqd,ksd->kqs", g_part, v[:, : block.stop]).reshape(p.shape)
        ds = (p * (dp - shift[:, :, block]) * scale).astype(q.dtype).reshape(K, -1, block.stop)
        p = p.astype(q.dtype).reshape(K, -1, block.stop)
        dqs.append(einsum("kqs,ksd->kqd", ds, k[:, : block.stop]).reshape(q[:, :, block].shape))
        dk = dk.at[:, : block.stop].add(einsum("kqs,kqd->ksd", ds, q_part))
        dv = dv.at[:, : block.stop].add(einsum("kqs,kqd->ksd", p, g_part))
    dq = _ungrouped(jnp.concatenate(dqs, axis=2)).astype(q.dtype)
    back = (1, 0, 2)
    return dq, dk.transpose(back).astype(k.dtype), dv.transpose(back).astype(v.dtype)
