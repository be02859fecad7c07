"""Attention of a query to a few keys of its own beside many that are already summed up.

Each index has K keys and values of its own, one a step, of which a query sees those of steps 1..k. Their
products are as many tiny matmuls as there are indices and heads. XLA for TPU spreads them over padded tiles:
written as batched matmuls it expects 12 ms of a step of Llama-3.1-8B's head with 8,192 indices, both
directions, and the memory that is read and written needs less than 1; so on TPU they are kernels.

Dimensions: C indices, N query heads, J key/value heads, G = N // J, d head_dim, K steps.
"""

from functools import partial

import jax
import jax.numpy as jnp

from common.layers import einsum
from train.heads.eagle3 import own_keys_tpu

KeysValues = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def join(
    scale: float, base_CNd: jax.Array, lse_CN: jax.Array, q_CNd: jax.Array, own: KeysValues, k: jax.Array
) -> jax.Array:
    """What queries [C, N, d] read of keys that are summed up as `base` [C, N, d] and the logsumexp `lse` of
    their logits, and of their own ones of steps 1..k among `own`, keys and values [K, C, J, d]."""
    return _forward(scale, base_CNd, lse_CN, q_CNd, own, k)[0]


def _forward(scale, *given):
    return _best(_read, own_keys_tpu.read, scale, *given), given


def _backward(scale, given, g_CNd):
    return *_best(_read_back, own_keys_tpu.read_back, scale, g_CNd, *given), None


join.defvjp(_forward, _backward)


def _best(plain, kernel, scale, *given):
    """By the platform's best way."""
    if not own_keys_tpu.serves(given[0]):
        return plain(scale, *given)
    return jax.lax.platform_dependent(*given, tpu=partial(kernel, scale), default=partial(plain, scale))


def _read(scale, base_CNd, lse_CN, q_CNd, own, k):
    first, others = _shares(scale, lse_CN, q_CNd, own, k)
    out = _grouped(base_CNd, own).astype(jnp.float32) * first[..., None]
    return _added(out, others, own[1]).reshape(base_CNd.shape).astype(base_CNd.dtype)


def _read_back(scale, g_CNd, base_CNd, lse_CN, q_CNd, own, k):
    """The cotangents of `base`, `lse`, `q` and `own`."""
    base, q, g = (_grouped(x, own) for x in (base_CNd, q_CNd, g_CNd))
    first, others = _shares(scale, lse_CN, q_CNd, own, k)
    wide = g.astype(jnp.float32)
    of_first = (wide * base.astype(jnp.float32)).sum(-1)
    of_others = jax.lax.map(partial(_products, g), own[1])
    mean = first * of_first + (others * of_others).sum(0)
    d_lse = (first * (of_first - mean)).reshape(lse_CN.shape)
    ds = (others * (of_others - mean[None]) * scale).astype(q.dtype)
    others = others.astype(g.dtype)
    dq = _added(jnp.zeros(q.shape, jnp.float32), ds, own[0])
    dk = jnp.stack([_sums(s, q) for s in ds])
    dv = jnp.stack([_sums(p, g) for p in others])
    d_base = (wide * first[..., None]).reshape(base_CNd.shape).astype(base_CNd.dtype)
    return d_base, d_lse, dq.reshape(q_CNd.shape).astype(q_CNd.dtype), (dk, dv)


def _shares(scale, lse_CN, q_CNd, own: KeysValues, k) -> tuple[jax.Array, jax.Array]:
    """(p of what is summed up [C, J, G], p of the own keys [K, C, J, G])."""
    q = _grouped(q_CNd, own)
    s = jax.lax.map(partial(_products, q), own[0]) * scale
    step = jnp.arange(len(s), dtype=jnp.int32)[:, None, None, None]
    s = jnp.where((step > 0) & (step <= k), s, -jnp.inf)
    lse = _grouped(lse_CN, own)
    top = jnp.maximum(lse, s.max(0))
    first, others = jnp.exp(lse - top), jnp.exp(s - top[None])
    total = first + others.sum(0)
    return first / total, others / total[None]


def _grouped(x_CNd: jax.Array, own: KeysValues) -> jax.Array:
    """[C, N, ...] -> [C, J, G, ...]: the heads that share keys beside each other."""
    return x_CNd.reshape(x_CNd.shape[0], own[0].shape[2], -1, *x_CNd.shape[2:])


def _added(to_CJGd: jax.Array, shares_KCJG: jax.Array, own_KCJd: jax.Array) -> jax.Array:
    """`to` and the sum of what is own by its shares; step by step, or all would be copied at once."""

    def add(to_CJGd: jax.Array, of_step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        share, x = of_step
        return to_CJGd + share.astype(jnp.float32)[..., None] * x[:, :, None].astype(jnp.float32), None

    return jax.lax.scan(add, to_CJGd, (shares_KCJG, own_KCJd))[0]


def _products(x_CJGd: jax.Array, own_CJd: jax.Array) -> jax.Array:
    return einsum("cjgd,cjd->cjg", x_CJGd, own_CJd)


def _sums(share_CJG: jax.Array, x_CJGd: jax.Array) -> jax.Array:
    return einsum("cjg,cjgd->cjd", share_CJG, x_CJGd).astype(x_CJGd.dtype)
