"""Causal attention inside documents that also returns its logsumexp, so that more keys can join later.

TTT attends from every step to the same keys of step 0. Scores are recomputed in the backward pass, block of
queries by block of queries, and keys behind a block are never touched: nothing of size [T, T] is kept.

Dimensions: B rows, T positions, N query heads, K key/value heads, G = N // K, D head_dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

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


def _grouped(x_BTND: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, D] -> [B, K, G, T, D]: the heads that share keys lie together."""
    B, T, N, D = x_BTND.shape
    return x_BTND.reshape(B, T, kv_heads, N // kv_heads, D).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTD: jax.Array) -> jax.Array:
    B, K, G, T, D = x_BKGTD.shape
    return x_BKGTD.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, D)


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _scores(q_BKGQD, k_BKSD, segments_BT, start: int, scale: float) -> jax.Array:
    """Masked float32 scores [B, K, G, Q, S] of the queries from `start` on against keys 0..S-1."""
    B, K, G, Q, D = q_BKGQD.shape
    S = k_BKSD.shape[2]
    s = jnp.einsum(
        "bkqd,bksd->bkqs", q_BKGQD.reshape(B, K, G * Q, D), k_BKSD, preferred_element_type=jnp.float32
    ).reshape(B, K, G, Q, S)
    causal_QS = jnp.arange(S)[None, :] <= jnp.arange(start, start + Q)[:, None]
    same_BQS = segments_BT[:, start : start + Q, None] == segments_BT[:, None, :S]
    mask = (causal_QS[None] & same_BQS)[:, None, None]
    return jnp.where(mask, s * scale, _MASKED)


def _forward(q_BTND, k_BTKD, v_BTKD, segments_BT, scale):
    B, T, K, D = k_BTKD.shape
    q = _grouped(q_BTND, K)
    k, v = k_BTKD.transpose(0, 2, 1, 3), v_BTKD.transpose(0, 2, 1, 3)
    outs, lses = [], []
    for start, end in _blocks(T):
        s = _scores(q[:, :, :, start:end], k[:, :, :end], segments_BT, start, scale)
        top = s.max(-1)
        e = jnp.exp(s - top[..., None])
        total = e.sum(-1)
        out = jnp.einsum(
            "bkqs,bksd->bkqd",
            e.astype(v.dtype).reshape(B, K, -1, end),
            v[:, :, :end],
            preferred_element_type=jnp.float32,
        ).reshape(*s.shape[:4], D)
        outs.append((out / total[..., None]).astype(q.dtype))
        lses.append(top + jnp.log(total))
    out = jnp.concatenate(outs, axis=3)
    lse = jnp.concatenate(lses, axis=3)
    result = _ungrouped(out), _ungrouped(lse[..., None])[..., 0]
    return result, (q, k, v, segments_BT, out, lse)


def _backward(scale, saved, cotangents):
    q, k, v, segments_BT, out, lse = saved
    g_out, g_lse = cotangents
    B, K, G, T, D = q.shape
    g = _grouped(g_out, K)
    # d s = p * (d p - sum(out * d out) + d lse)
    shift = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - _grouped(g_lse[..., None], K)[..., 0]
    dqs = []
    dk = jnp.zeros((B, K, T, D), jnp.float32)
    dv = jnp.zeros((B, K, T, D), jnp.float32)
    for start, end in _blocks(T):
        part = slice(start, end)
        s = _scores(q[:, :, :, part], k[:, :, :end], segments_BT, start, scale)
        p = jnp.exp(s - lse[:, :, :, part, None])
        g_part = g[:, :, :, part].reshape(B, K, -1, D)
        dp = jnp.einsum("bkqd,bksd->bkqs", g_part, v[:, :, :end], preferred_element_type=jnp.float32)
        ds = (p * (dp.reshape(p.shape) - shift[:, :, :, part, None]) * scale).astype(q.dtype)
        ds = ds.reshape(B, K, -1, end)
        p = p.astype(q.dtype).reshape(B, K, -1, end)
        q_part = q[:, :, :, part].reshape(B, K, -1, D)
        f32 = {"preferred_element_type": jnp.float32}
        dqs.append(jnp.einsum("bkqs,bksd->bkqd", ds, k[:, :, :end], **f32).reshape(B, K, G, -1, D))
        dk = dk.at[:, :, :end].add(jnp.einsum("bkqs,bkqd->bksd", ds, q_part, **f32))
        dv = dv.at[:, :, :end].add(jnp.einsum("bkqs,bkqd->bksd", p, g_part, **f32))
    dq = _ungrouped(jnp.concatenate(dqs, axis=3)).astype(q.dtype)
    back = (0, 2, 1, 3)
    return dq, dk.transpose(back).astype(k.dtype), dv.transpose(back).astype(v.dtype), None


attend.defvjp(_forward, _backward)
