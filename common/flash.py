"""Attention on NVIDIA GPUs: Pallas kernels that Triton compiles. Arguments are those of common/attention.py.

A program of the grid holds one block of queries (of keys, where their cotangents are made) of one head, and
goes over the blocks that its documents share with it; no other is read. Exponentials are base 2, sums
float32. Formulas: FlashAttention-2 (arXiv 2307.08691).

Dimensions: as there; L positions, T filled up to whole blocks; D and E head sizes, d and e filled up to a
power of two, which Triton's tiles need; n blocks of queries, m blocks of keys; Q queries and S keys a block.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from common.layers import MASKED

QUERIES = 128  # positions of a block; half of it where cotangents take the room
KEYS = 64
_LOG2E = math.log2(math.e)
_LAST = 2**30  # padding's segment: behind all others
_MOST = 256  # the blocks of larger heads do not fit in a program's registers


class _Form(NamedTuple):
    """What a kernel is compiled for; `queries` positions a block, `groups` heads that share keys."""

    scale: float
    window: int | None
    queries: int
    groups: int


def serves(q_BTNd: jax.Array, v_BTJe: jax.Array) -> bool:
    """Whether the kernels compute what is asked: their matmuls take 16 bits, their heads are at most 256."""
    halves = q_BTNd.dtype in (jnp.bfloat16, jnp.float16)
    return halves and max(q_BTNd.shape[-1], v_BTJe.shape[-1]) <= _MOST


def attend(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """([B, T, N, e], logsumexp [B, T, N] if it is asked for); `interpret` runs the kernel's steps one by one,
    on any device."""
    (B, T, N, _), J, e = q_BTNd.shape, k_BTJd.shape[2], v_BTJe.shape[-1]
    form = _Form(scale, window, QUERIES, N // J)
    segments_BL = _segments(segments_BT)
    first_Bn, _ = _bounds(form, segments_BL)
    q, k, v = (_filled(x) for x in (q_BTNd, k_BTJd, v_BTJe))
    sinks = jnp.full(N, MASKED, jnp.float32) if sinks_N is None else sinks_N.astype(jnp.float32)
    L, n, D, E = *segments_BL.shape[1:], first_Bn.shape[1], q.shape[-1], v.shape[-1]

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, QUERIES, None, size), lambda i, b, h: (b, i, h, 0))

    def keys(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, L, None, size), lambda i, b, h: (b, 0, h // form.groups, 0))

    row = [pl.BlockSpec((None, size), lambda i, b, h: (b, 0)) for size in (L, n)]
    out, lse = pl.pallas_call(
        partial(_attend, form),
        grid=(n, B, N),
        in_specs=[block(D), keys(D), keys(E), *row, pl.BlockSpec((N,), lambda i, b, h: (0,))],
        out_specs=[block(E), pl.BlockSpec((None, None, QUERIES), lambda i, b, h: (b, h, i))],
        out_shape=[jax.ShapeDtypeStruct((B, L, N, E), q.dtype), jax.ShapeDtypeStruct((B, N, L), jnp.float32)],
        **_options("attend", D, interpret),
    )(q, k, v, segments_BL, first_Bn, sinks)
    return out[:, :T, :, :e], lse[:, :, :T].transpose(0, 2, 1) if return_lse else None


def pull_back(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    lse_BTN: jax.Array,
    g_BTNe: jax.Array,
    shift_BTN: jax.Array,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of q, k and v. `lse` as `attend` gives it, with sinks in it if there are any; `shift` is
    sum(out * d out) - d lse."""
    (B, T, N, d), J, e = q_BTNd.shape, k_BTJd.shape[2], v_BTJe.shape[-1]
    form = _Form(scale, window, QUERIES // 2, N // J)
    segments_BL = _segments(segments_BT)
    first_Bn, last_Bm = _bounds(form, segments_BL)
    q, k, v, g = (_filled(x) for x in (q_BTNd, k_BTJd, v_BTJe, g_BTNe))
    L, n, m, D, E = segments_BL.shape[1], first_Bn.shape[1], last_Bm.shape[1], q.shape[-1], v.shape[-1]
    lse, shift = (
        jnp.pad(x.transpose(0, 2, 1), ((0, 0), (0, 0), (0, L - T)), constant_values=fill)
        for x, fill in ((lse_BTN, -MASKED), (shift_BTN, 0.0))
    )

    def own(positions: int, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, positions, None, size), lambda i, b, h: (b, i, h, 0))

    def keys(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, L, None, size), lambda i, b, h: (b, 0, h // form.groups, 0))

    def group(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, L, form.groups, size), lambda j, b, h: (b, 0, h, 0))

    def row(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, size), lambda i, b, h: (b, 0))

    number = pl.BlockSpec((None, None, form.queries), lambda i, b, h: (b, h, i))
    own_queries = own(form.queries, D), keys(D), keys(E), row(L), row(n)
    dq = pl.pallas_call(
        partial(_queries_back, form),
        grid=(n, B, N),
        in_specs=[*own_queries, number, own(form.queries, E), number],
        out_specs=own(form.queries, D),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        **_options("queries_back", D, interpret),
    )(q, k, v, segments_BL, first_Bn, lse, g, shift)

    numbers = pl.BlockSpec((None, form.groups, L), lambda j, b, h: (b, h, 0))
    dk, dv = pl.pallas_call(
        partial(_keys_back, form),
        grid=(m, B, J),
        in_specs=[group(D), own(KEYS, D), own(KEYS, E), row(L), row(m), numbers, group(E), numbers],
        out_specs=[own(KEYS, D), own(KEYS, E)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        **_options("keys_back", D, interpret),
    )(q, k, v, segments_BL, last_Bm, lse, g, shift)
    return dq[:, :T, :, :d], dk[:, :T, :, :d], dv[:, :T, :, :e]


def _options(name: str, D: int, interpret: bool) -> dict[str, Any]:
    warps = 4 if D <= 64 else 8
    compiler = triton.CompilerParams(num_warps=warps, num_stages=2)
    return {"name": f"flash_{name}", "interpret": interpret, "compiler_params": compiler}


def _filled(x_BTNd: jax.Array) -> jax.Array:
    """[B, L, N, D], zeros behind."""
    T, d = x_BTNd.shape[1], x_BTNd.shape[3]
    D = max(16, pl.next_power_of_2(d))  # 16: the least of a matmul
    return jnp.pad(x_BTNd, ((0, 0), (0, -T % QUERIES), (0, 0), (0, D - d)))


def _segments(segments_BT: jax.Array) -> jax.Array:
    """[B, L], padding behind all documents."""
    kept = jnp.where(segments_BT > 0, segments_BT, _LAST)
    return jnp.pad(kept, ((0, 0), (0, -kept.shape[1] % QUERIES)), constant_values=_LAST)


def _bounds(form: _Form, segments_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first block of keys [B, n] that each block of queries sees, the last block of queries [B, m] that
    sees each block of keys)."""
    queries, keys = (segments_BL.reshape(len(segments_BL), -1, size) for size in (form.queries, KEYS))
    n, m = queries.shape[1], keys.shape[1]
    start_n1, start_1m = jnp.arange(n)[:, None] * form.queries, jnp.arange(m)[None] * KEYS
    shared = (queries.min(2)[:, :, None] <= keys.max(2)[:, None]) & (
        queries.max(2)[:, :, None] >= keys.min(2)[:, None]
    )
    near = start_1m < start_n1 + form.queries
    if form.window is not None:
        near &= start_1m + KEYS > start_n1 + 1 - form.window
    seen = shared & near[None]
    return jnp.argmax(seen, 2).astype(jnp.int32), (n - 1 - jnp.argmax(seen[:, ::-1], 1)).astype(jnp.int32)


def _logits(form: _Form, q_QD, k_SD, segments_ref, i, j) -> tuple[jax.Array, jax.Array]:
    """(float32 logits [Q, S] of block i's queries for block j's keys, unmasked; bool, what is seen)."""
    s = triton.dot(q_QD, k_SD.T) * form.scale
    queries, keys = i * form.queries + jnp.arange(form.queries), j * KEYS + jnp.arange(KEYS)
    own, other = (segments_ref[pl.ds(at * size, size)] for at, size in ((i, form.queries), (j, KEYS)))
    seen = (own[:, None] == other[None]) & (queries[:, None] >= keys[None])
    if form.window is not None:
        seen &= queries[:, None] - keys[None] < form.window
    return s, seen


def _attend(form, q_ref, k_ref, v_ref, segments_ref, first_ref, sinks_ref, out_ref, lse_ref) -> None:
    i = pl.program_id(0)
    q = q_ref[...]

    def of_keys(j, carry):
        top, total, out = carry
        at = pl.ds(j * KEYS, KEYS)
        s, seen = _logits(form, q, k_ref[at, :], segments_ref, i, j)
        s = jnp.where(seen, s * _LOG2E, MASKED)
        new = jnp.maximum(top, s.max(1))
        p, fade = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
        v = v_ref[at, :]
        return new, total * fade + p.sum(1), out * fade[:, None] + triton.dot(p.astype(v.dtype), v)

    # a sink is a key with no value; one that is masked is forgotten at the first key that is seen
    top = jnp.zeros(form.queries, jnp.float32) + sinks_ref[pl.program_id(2)] * _LOG2E
    start = top, jnp.ones(form.queries, jnp.float32), jnp.zeros(out_ref.shape, jnp.float32)
    last = (i + 1) * (form.queries // KEYS)
    top, total, out = jax.lax.fori_loop(first_ref[i], last, of_keys, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = (top + jnp.log2(total)) / _LOG2E


def _cotangents(form: _Form, s_QS, seen_QS, lse_Q, g_QE, v_SE, shift_Q) -> tuple[jax.Array, jax.Array]:
    """(the probabilities [Q, S], the cotangent of q k) in float32."""
    p = jnp.where(seen_QS, jnp.exp2((s_QS - lse_Q[:, None]) * _LOG2E), 0.0)
    ds = p * (triton.dot(g_QE, v_SE.T) - shift_Q[:, None]) * form.scale
    return p, ds


def _queries_back(
    form, q_ref, k_ref, v_ref, segments_ref, first_ref, lse_ref, g_ref, shift_ref, dq_ref
) -> None:
    i = pl.program_id(0)
    q, g, lse, shift = (ref[...] for ref in (q_ref, g_ref, lse_ref, shift_ref))

    def of_keys(j, dq):
        at = pl.ds(j * KEYS, KEYS)
        k = k_ref[at, :]
        s, seen = _logits(form, q, k, segments_ref, i, j)
        _, ds = _cotangents(form, s, seen, lse, g, v_ref[at, :], shift)
        return dq + triton.dot(ds.astype(k.dtype), k)

    last = (i + 1) * (form.queries // KEYS)
    dq = jax.lax.fori_loop(first_ref[i], last, of_keys, jnp.zeros(dq_ref.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _keys_back(
    form, q_ref, k_ref, v_ref, segments_ref, last_ref, lse_ref, g_ref, shift_ref, dk_ref, dv_ref
) -> None:
    j = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def of_queries(step, carry):
        dk, dv = carry
        i, h = first + jax.lax.div(step, form.groups), jax.lax.rem(step, form.groups)
        at = pl.ds(i * form.queries, form.queries)
        q, g = q_ref[at, h, :], g_ref[at, h, :]
        s, seen = _logits(form, q, k, segments_ref, i, j)
        p, ds = _cotangents(form, s, seen, lse_ref[h, at], g, v, shift_ref[h, at])
        return dk + triton.dot(ds.astype(q.dtype).T, q), dv + triton.dot(p.astype(g.dtype).T, g)

    first = jax.lax.div(j * KEYS, form.queries)
    start = tuple(jnp.zeros(ref.shape, jnp.float32) for ref in (dk_ref, dv_ref))
    dk, dv = jax.lax.fori_loop(0, (last_ref[j] - first + 1) * form.groups, of_queries, start)
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
