"""Causal attention inside the documents of packed rows, a block of queries and a block of keys at a time.

Both stages use it. Nothing of the size of T x T is ever held, in neither direction, and blocks of keys that
no query of a block can see (later ones, other documents', those behind the window) are never touched.

Dimensions: B rows, T positions, N query heads, J key/value heads, G = N // J, d head_dim of queries and
keys, e head_dim of values; n blocks of Q queries, R = G * Q queries that share keys, S keys of a block.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common import flash, splash
from common.layers import MASKED, einsum

_KERNELS = {"tpu": splash, "cuda": flash}  # by jax's names of platforms; elsewhere XLA makes the program
KEPT = "attended"  # names what a jax.checkpoint around attend should keep
BLOCK = 256  # queries, and keys: large enough for full matmuls, small enough to skip half of the keys
_LAST = 2**30  # padding's segment: behind all others, so that no document's block looks at it


class _Form(NamedTuple):
    scale: float
    window: int | None
    return_lse: bool


def attend(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * q k) v [B, T, N, e] over earlier-or-equal positions of the same segment.

    `window`: only the latest `window` keys, the query's own included. `sinks_N`: a logit a head that takes
    part in the softmax and carries no value. `return_lse`: also the logsumexp of the logits [B, T, N],
    float32, by which more keys can join later.
    Differentiable in q, k, v and sinks. Formulas: FlashAttention (arXiv 2205.14135), with the cotangent of
    the logsumexp added.
    """
    form = _Form(scale, window, return_lse)
    out, lse = _attend(form, q_BTNd, k_BTJd, v_BTJe, sinks_N, segments_BT)
    return (out, lse) if return_lse else out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: _Form, q, k, v, sinks, segments):
    return _computed(form, q, k, v, sinks, segments)


def _computed(form: _Form, q, k, v, sinks, segments) -> tuple[jax.Array, jax.Array | None]:
    """(out, logsumexp if it is to be returned), by the platform's best way."""

    def blockwise(*arrays):
        out, lse = jax.lax.map(lambda row: _row(form, sinks, *row), arrays)
        return out, lse if form.return_lse else None

    def by(kernels):
        return lambda *arrays: kernels.attend(*arrays, form.scale, form.window, sinks, form.return_lse)

    served = {name: by(kernels) for name, kernels in _KERNELS.items() if kernels.serves(q, v)}
    return jax.lax.platform_dependent(q, k, v, segments, **served, default=blockwise)


def _forward(form, q, k, v, sinks, segments):
    found = _computed(form._replace(return_lse=True), q, k, v, sinks, segments)
    out, lse = (checkpoint_name(x, KEPT) for x in found)
    return (out, lse if form.return_lse else None), (q, k, v, sinks, segments, out, lse)


def _backward(form, saved, cotangents):
    q, k, v, sinks, segments, out, lse = saved
    g_out, g_lse = cotangents
    # d logits = p * (d p - sum(out * d out) + d lse)
    shift = (g_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    shift = shift if g_lse is None else shift - g_lse
    dq, dk, dv = _pulled_back(form, q, k, v, segments, lse, g_out, shift)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32)[None, None] - lse)
        d_sinks = -(share * shift).sum((0, 1)).astype(sinks.dtype)
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_forward, _backward)


def _pulled_back(form: _Form, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of q, k and v, by the platform's best way."""

    def blockwise(*arrays):
        return jax.lax.map(lambda row: _row_back(form, *row), arrays)

    def by(kernels):
        return lambda *arrays: kernels.pull_back(*arrays, form.scale, form.window)

    served = {name: by(kernels) for name, kernels in _KERNELS.items() if kernels.serves(arrays[0], arrays[2])}
    return jax.lax.platform_dependent(*arrays, **served, default=blockwise)


def _in_blocks(x_TNd: jax.Array, J: int) -> jax.Array:
    """[T, N, d] -> [n, J, R, d]: blocks of positions, and the heads that share keys beside each other."""
    T, N, d = x_TNd.shape
    Q = min(BLOCK, T)
    x = jnp.pad(x_TNd, ((0, -T % Q), (0, 0), (0, 0)))
    return x.reshape(-1, Q, J, N // J, d).transpose(0, 2, 3, 1, 4).reshape(-1, J, N // J * Q, d)


def _from_blocks(x_nJRd: jax.Array, T: int) -> jax.Array:
    """The inverse of `_in_blocks`."""
    n, J, R, d = x_nJRd.shape
    Q = min(BLOCK, T)
    return x_nJRd.reshape(n, J, R // Q, Q, d).transpose(0, 3, 1, 2, 4).reshape(n * Q, -1, d)[:T]


def _segments(form: _Form, segments_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(segments [n, Q], the first block of keys [n] that each block of queries has to look at)."""
    T = len(segments_T)
    Q = min(BLOCK, T)
    segments_nQ = jnp.pad(jnp.where(segments_T > 0, segments_T, _LAST), (0, -T % Q), constant_values=_LAST)
    segments_nQ = segments_nQ.reshape(-1, Q)
    low, high, number = segments_nQ.min(1), segments_nQ.max(1), jnp.arange(len(segments_nQ))
    seen = (low[None] <= high[:, None]) & (high[None] >= low[:, None])
    if form.window is not None:
        seen &= (number[None] + 1) * Q > number[:, None] * Q + 1 - form.window
    return segments_nQ, jnp.minimum(jnp.argmax(seen, 1), number).astype(jnp.int32)


def _logits(form: _Form, q_JRd, k_JSd, segments_nQ, i, j) -> tuple[jax.Array, jax.Array]:
    """(float32 logits [J, R, S] of block i's queries for block j's keys, unmasked; bool [1, R, S], what is
    seen)."""
    s = einsum("jrd,jsd->jrs", q_JRd, k_JSd) * form.scale
    Q = segments_nQ.shape[1]
    apart_QS = (i - j) * Q + jnp.arange(Q)[:, None] - jnp.arange(Q)[None]
    seen_QS = (segments_nQ[i][:, None] == segments_nQ[j][None]) & (apart_QS >= 0)
    if form.window is not None:
        seen_QS &= apart_QS < form.window
    return s, jnp.tile(seen_QS, (q_JRd.shape[1] // Q, 1))[None]


def _row(form: _Form, sinks_N, q_TNd, k_TJd, v_TJe, segments_T) -> tuple[jax.Array, jax.Array]:
    """(out [T, N, e], logsumexp [T, N]) of one row."""
    (T, N, _), J = q_TNd.shape, k_TJd.shape[1]
    q, k, v = (_in_blocks(x, J) for x in (q_TNd, k_TJd, v_TJe))
    segments, first = _segments(form, segments_T)
    R = q.shape[2]

    def start(q_JRd):
        zero_JR = jnp.zeros_like(q_JRd[..., 0], jnp.float32)
        out = jnp.zeros_like(q_JRd[..., :1], jnp.float32) * jnp.zeros((1, 1, v.shape[-1]), jnp.float32)
        if sinks_N is None:
            return zero_JR + MASKED, zero_JR, out
        sinks = jnp.repeat(sinks_N.astype(jnp.float32).reshape(J, N // J), R * J // N, 1)
        return zero_JR + sinks, zero_JR + 1, out

    def of_queries(block):
        i, q_JRd = block

        def of_keys(j, carry):
            top, total, out = carry
            s, seen = _logits(form, q_JRd, k[j], segments, i, j)
            s = jnp.where(seen, s, MASKED)
            new = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            mixed = einsum("jrs,jse->jre", p.astype(v.dtype), v[j])
            return new, total * fade + p.sum(-1), out * fade[..., None] + mixed

        top, total, out = jax.lax.fori_loop(first[i], i + 1, of_keys, start(q_JRd))
        return (out / total[..., None]).astype(q.dtype), (top + jnp.log(total))[..., None]

    out, lse = jax.lax.map(of_queries, (jnp.arange(len(q), dtype=jnp.int32), q))
    return _from_blocks(out, T), _from_blocks(lse, T)[..., 0]


def _row_back(form: _Form, q_TNd, k_TJd, v_TJe, segments_T, lse_TN, g_TNe, shift_TN):
    """The cotangents of q, k and v of one row."""
    T, J = len(segments_T), k_TJd.shape[1]
    q, k, v, g, lse, shift = (
        _in_blocks(x, J) for x in (q_TNd, k_TJd, v_TJe, g_TNe, lse_TN[..., None], shift_TN[..., None])
    )
    segments, first = _segments(form, segments_T)

    def of_queries(carry, block):
        i, q_JRd, g_JRe, lse_JR1, shift_JR1 = block

        def of_keys(j, carry):
            dq, dk, dv = carry
            s, seen = _logits(form, q_JRd, k[j], segments, i, j)
            p = jnp.where(seen, jnp.exp(s - lse_JR1), 0.0)
            ds = p * (einsum("jre,jse->jrs", g_JRe, v[j]) - shift_JR1) * form.scale
            p, ds = p.astype(q.dtype), ds.astype(q.dtype)
            dq = dq + einsum("jrs,jsd->jrd", ds, k[j])
            dk = dk.at[j].add(einsum("jrd,jrs->jds", q_JRd, ds))
            return dq, dk, dv.at[j].add(einsum("jre,jrs->jes", g_JRe, p))

        dq, *carry = jax.lax.fori_loop(first[i], i + 1, of_keys, (jnp.zeros_like(q_JRd, jnp.float32), *carry))
        return tuple(carry), dq.astype(q.dtype)

    # Of two ways to sum over queries, XLA for CPU is twice as fast with the larger dimension last.
    zeros = tuple(jnp.zeros_like(x.mT, jnp.float32) for x in (k, v))
    numbered = jnp.arange(len(q), dtype=jnp.int32), q, g, lse, shift
    (dk, dv), dq = jax.lax.scan(of_queries, zeros, numbered)
    dk, dv = (_from_blocks(x.mT.astype(k.dtype), T) for x in (dk, dv))
    return _from_blocks(dq, T), dk, dv
