"""Attention of a query to a few keys of its own beside many that are already summed up.

Each index has K keys and values of its own, one a step, of which a query sees those of steps 1..k. Their
products are as many tiny matmuls as there are indices and heads. XLA for TPU spreads them over padded tiles:
written as batched matmuls it expects 12 ms of a step of Llama-3.1-8B's head with 8,192 indices, both
directions, and the memory that is read and written needs less than 1; so on TPU they are kernels.

Elsewhere a loop ends behind step k, so that later steps are not multiplied. On a GPU a loop that may end
early asks the host each time; there all K are multiplied, and those behind k are masked.

Own keys and values, and what is read, have all heads of an index beside each other, as matmuls take them.

Dimensions: B rows of m indices, C = B * m, N query heads, J key/value heads, G = N // J, d head_dim, K steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.layers import einsum
from train.heads import own_keys_tpu

KeysValues = tuple[jax.Array, jax.Array]
OfStep = Callable[[Any, jax.Array], jax.Array]
Over = Callable[[jax.Array, OfStep, jax.Array, int], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def join(
    scale: float, base_BmNd: jax.Array, lse_BmN: jax.Array, q_BmNd: jax.Array, own: KeysValues, k: jax.Array
) -> jax.Array:
    """What queries read [C, N * d], of keys that are summed up as `base` and the logsumexp `lse` of their
    logits, and of their own ones of steps 1..k among `own`, keys and values [K, C, J * d]."""
    return _forward(scale, base_BmNd, lse_BmN, q_BmNd, own, k)[0]


def _forward(scale, *given):
    return _best(_read, own_keys_tpu.read, scale, *given), given


def _backward(scale, given, g_CY):
    return *_best(_read_back, own_keys_tpu.read_back, scale, *given, g_CY), None


join.defvjp(_forward, _backward)


def _best(plain, kernel, scale, *given):
    """By the platform's best way."""
    ways = {"cuda": partial(plain, _masked, scale)}
    if own_keys_tpu.serves(given[0]):
        ways["tpu"] = partial(kernel, scale)
    return jax.lax.platform_dependent(*given, **ways, default=partial(plain, _looped, scale))


def _looped(k: jax.Array, of_step: OfStep, first: jax.Array, _: int) -> jax.Array:
    """`first`, changed by each of the steps 1..k."""
    return jax.lax.fori_loop(1, k + 1, of_step, first)


def _masked(k: jax.Array, of_step: OfStep, first: jax.Array, steps: int) -> jax.Array:
    """The same of `steps` steps, of which those behind k change nothing."""
    for i in range(1, steps):
        first = jnp.where(i <= k, of_step(i, first), first)
    return first


def _read(over, scale, base_BmNd, lse_BmN, q_BmNd, own, k):
    base, lse, q = _grouped(base_BmNd, lse_BmN, q_BmNd, own)
    first, others = _shares(over, scale, lse, q, own[0], k)
    out = base.astype(jnp.float32) * first[..., None]
    out = _added(over, k, out, others, own[1])
    return out.reshape(len(base), -1).astype(base.dtype)


def _read_back(over, scale, base_BmNd, lse_BmN, q_BmNd, own, k, g_CY):
    """The cotangents of `base`, `lse`, `q` and `own`."""
    whole = base_BmNd, lse_BmN, q_BmNd, *own
    base, lse, q = _grouped(base_BmNd, lse_BmN, q_BmNd, own)
    g = g_CY.reshape(q.shape)
    first, others = _shares(over, scale, lse, q, own[0], k)
    of_first = einsum("cjgd,cjgd->cjg", g, base)
    of_others = _products(over, g, own[1], k, 0.0)
    mean = first * of_first + (others * of_others).sum(0)
    d_lse = first * (of_first - mean)
    ds = (others * (of_others - mean[None]) * scale).astype(q.dtype)
    others = others.astype(g.dtype)

    dq = _added(over, k, jnp.zeros(q.shape, jnp.float32), ds, own[0])
    dk, dv = _sums(ds, q), _sums(others, g)
    found = g.astype(jnp.float32) * first[..., None], d_lse, dq, dk, dv
    found = (x.reshape(like.shape).astype(like.dtype) for x, like in zip(found, whole, strict=True))
    d_base, d_lse, dq, *d_own = found
    return d_base, d_lse, dq, tuple(d_own)


def _shares(over, scale, lse_CJG, q_CJGd, keys_KCY, k) -> tuple[jax.Array, jax.Array]:
    """(p of what is summed up [C, J, G], p of the own keys [K, C, J, G])."""
    s = _products(over, q_CJGd, keys_KCY, k, -jnp.inf) * scale
    top = jnp.maximum(lse_CJG, s.max(0))
    first, others = jnp.exp(lse_CJG - top), jnp.exp(s - top[None])
    total = first + others.sum(0)
    return first / total, others / total[None]


def _products(over: Over, x_CJGd: jax.Array, own_KCY: jax.Array, k: jax.Array, otherwise: float) -> jax.Array:
    """float32 [K, C, J, G], of steps 1..k; step by step, or all would be copied at once."""

    def of_step(i: jax.Array, found_KCJG: jax.Array) -> jax.Array:
        return _set(found_KCJG, i, einsum("cjgd,cjd->cjg", x_CJGd, _of_step(own_KCY, i, x_CJGd.shape[1])))

    none = jnp.full((len(own_KCY), *x_CJGd.shape[:3]), otherwise, jnp.float32)
    return over(k, of_step, none, len(own_KCY))


def _added(
    over: Over, k: jax.Array, to_CJGd: jax.Array, shares_KCJG: jax.Array, own_KCY: jax.Array
) -> jax.Array:
    """`to` and what is own of steps 1..k, by its shares."""
    return over(k, lambda i, to: to + _weighted(shares_KCJG[i], own_KCY, i), to_CJGd, len(own_KCY))


def _set(x_K: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x_K, x, i, 0)


def _grouped(base_BmNd, lse_BmN, q_BmNd, own: KeysValues) -> tuple:
    """base and q [C, J, G, d], lse [C, J, G]: heads that share keys beside each other."""
    C, d = own[0].shape[1], q_BmNd.shape[-1]
    lead = C, own[0].shape[2] // d
    return base_BmNd.reshape(*lead, -1, d), lse_BmN.reshape(*lead, -1), q_BmNd.reshape(*lead, -1, d)


def _of_step(own_KCY: jax.Array, i: jax.Array, heads: int) -> jax.Array:
    """[C, J, d]; of all steps in this shape, XLA for CPU would make a copy at every step."""
    return own_KCY[i].reshape(own_KCY.shape[1], heads, -1)


def _weighted(share_CJG: jax.Array, own_KCY: jax.Array, i: jax.Array) -> jax.Array:
    own_CJd = _of_step(own_KCY, i, share_CJG.shape[1])
    return share_CJG.astype(jnp.float32)[..., None] * own_CJd[:, :, None].astype(jnp.float32)


def _sums(shares_KCJG: jax.Array, x_CJGd: jax.Array) -> jax.Array:
    """[K, C, J, d]: sums over the queries that share a key. Products and no matmuls, which XLA for CPU takes
    into what they are added to, so that nothing of all steps is held beside it."""
    shares, x = shares_KCJG.astype(jnp.float32), x_CJGd[None].astype(jnp.float32)
    parts = [shares[..., g, None] * x[..., g, :] for g in range(x.shape[3])]
    return sum(parts[1:], parts[0]).astype(x_CJGd.dtype)
