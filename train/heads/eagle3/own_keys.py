"""Attention of a query to a few keys of its own beside many that are already summed up.

Each index has K keys and values of its own, one a step, of which a query sees those of steps 1..k. Their
products are as many tiny matmuls as there are indices and heads. Written as two batched matmuls each way the
TPU compiler expects a fifth of the time that it expects of products spread over [K, C, N, d]; the backward
pass is written out because autodiff's sums over the steps, which are padded to a tile of 128, cost as much
again (Qwen3-32B's head, 8,192 indices, both directions: 8 ms a step, by autodiff 12, spread out 46).

Dimensions: C indices, N query heads, J key/value heads, G = N // J, d head_dim, K steps.
"""

from functools import partial

import jax
import jax.numpy as jnp

from common.layers import einsum

KeysValues = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def join(
    scale: float, base_CNd: jax.Array, lse_CN: jax.Array, q_CNd: jax.Array, own: KeysValues, k: jax.Array
) -> jax.Array:
    """What queries [C, N, d] read of keys that are summed up as `base` [C, N, d] and the logsumexp `lse` of
    their logits, and of their own ones of steps 1..k among `own`, keys and values [C, J, K, d]."""
    return _forward(scale, base_CNd, lse_CN, q_CNd, own, k)[0]


def _grouped(x_CNd: jax.Array, own: KeysValues) -> jax.Array:
    """[C, N, ...] -> [C, J, G, ...]: the heads that share keys beside each other."""
    return x_CNd.reshape(x_CNd.shape[0], own[0].shape[1], -1, *x_CNd.shape[2:])


def _products(x_CJGd: jax.Array, own_CJKd: jax.Array) -> jax.Array:
    """float32 [K, J, G, C]: small, with the many indices last."""
    return einsum("cjgd,cjkd->cjgk", x_CJGd, own_CJKd).transpose(3, 1, 2, 0)


def _shares(scale: float, lse_CN, q_CNd, own: KeysValues, k) -> tuple[jax.Array, jax.Array]:
    """(p of what is summed up [J, G, C], p of the own keys [K, J, G, C])."""
    s = _products(_grouped(q_CNd, own), own[0]) * scale
    step = jnp.arange(len(s), dtype=jnp.int32)[:, None, None, None]
    s = jnp.where((step > 0) & (step <= k), s, -jnp.inf)
    lse = _grouped(lse_CN, own).transpose(1, 2, 0)
    top = jnp.maximum(lse, s.max(0))
    first, others = jnp.exp(lse - top), jnp.exp(s - top[None])
    total = first + others.sum(0)
    return first / total, others / total[None]


def _forward(scale, base_CNd, lse_CN, q_CNd, own, k):
    first, others = _shares(scale, lse_CN, q_CNd, own, k)
    read = einsum("cjgk,cjkd->cjgd", _by_index(others, base_CNd), own[1])
    out = _times(_grouped(base_CNd, own), first) + read
    return out.reshape(base_CNd.shape).astype(base_CNd.dtype), (base_CNd, lse_CN, q_CNd, own, k)


def _backward(scale, saved, g_CNd):
    base_CNd, lse_CN, q_CNd, own, k = saved
    base, q, g = (_grouped(x, own) for x in (base_CNd, q_CNd, g_CNd))
    first, others = _shares(scale, lse_CN, q_CNd, own, k)
    of_first = (g.astype(jnp.float32) * base.astype(jnp.float32)).sum(-1).transpose(1, 2, 0)
    of_others = _products(g, own[1])
    mean = first * of_first + (others * of_others).sum(0)
    d_lse = (first * (of_first - mean)).transpose(2, 0, 1).reshape(lse_CN.shape)
    ds = _by_index(others * (of_others - mean[None]) * scale, q)
    d_base = _times(g, first).reshape(base_CNd.shape).astype(base_CNd.dtype)
    dq = einsum("cjgk,cjkd->cjgd", ds, own[0]).reshape(q_CNd.shape).astype(q_CNd.dtype)
    dk = einsum("cjgk,cjgd->cjkd", ds, q).astype(q.dtype)
    dv = einsum("cjgk,cjgd->cjkd", _by_index(others, g), g).astype(g.dtype)
    return d_base, d_lse, dq, (dk, dv), None


def _by_index(x_KJGC: jax.Array, like: jax.Array) -> jax.Array:
    return x_KJGC.transpose(3, 1, 2, 0).astype(like.dtype)


def _times(x_CJGd: jax.Array, share_JGC: jax.Array) -> jax.Array:
    return x_CJGd.astype(jnp.float32) * share_JGC.transpose(2, 0, 1)[..., None]


join.defvjp(_forward, _backward)
