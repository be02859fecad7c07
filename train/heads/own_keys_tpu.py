"""The kernels of own_keys.py for TPU, where the formulas are: a block of indices at a time in fast memory.

Queries, and what is summed up, come and go head by head, as the kernels of attention have them; everything
else has its heads beside each other. Inside all is [c, d]: a register holds 128 numbers of d for 8 indices.

Dimensions as there; c indices of a block, which has the G query heads of one key/value head.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.layers import MASKED

LANES = 128
BLOCK = 64  # indices


def serves(x_BmNd: jax.Array) -> bool:
    """Whether the kernels take such arrays: heads as wide as registers, indices in whole blocks."""
    return x_BmNd.dtype == jnp.bfloat16 and x_BmNd.shape[3] % LANES == 0 and x_BmNd.shape[1] % BLOCK == 0


def read(scale: float, base_BmNd, lse_BmN, q_BmNd, own, k, interpret: bool = False) -> jax.Array:
    """What `join` gives."""
    given = _by_heads(base_BmNd, lse_BmN, q_BmNd, own)
    shapes = (_beside(q_BmNd),)
    return _call(partial(_read, scale), q_BmNd.shape, given, shapes, k, interpret)[0]


def read_back(scale: float, base_BmNd, lse_BmN, q_BmNd, own, k, g_CY, interpret: bool = False) -> tuple:
    """The cotangents of `base`, `lse`, `q` and `own`."""
    given = _by_heads(base_BmNd, lse_BmN, q_BmNd, own)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
    found = _call(partial(_read_back, scale), q_BmNd.shape, (*given, g_CY), shapes, k, interpret)
    d_base, d_lse, dq, *d_own = found
    return d_base.swapaxes(1, 2), d_lse.reshape(lse_BmN.shape), dq.swapaxes(1, 2), tuple(d_own)


def _by_heads(base_BmNd, lse_BmN, q_BmNd, own) -> tuple[jax.Array, ...]:
    """base and q [B, N, m, d], lse [C, N], own [K, C, J d] twice."""
    return base_BmNd.swapaxes(1, 2), lse_BmN.reshape(-1, lse_BmN.shape[2]), q_BmNd.swapaxes(1, 2), *own


def _beside(x_BmNd: jax.Array) -> jax.ShapeDtypeStruct:
    B, m, N, d = x_BmNd.shape
    return jax.ShapeDtypeStruct((B * m, N * d), x_BmNd.dtype)


def _call(kernel: Any, shape_BmNd: tuple, given: tuple, shapes: Any, k: jax.Array, interpret: bool) -> tuple:
    """Blocks of a row's indices, of which one key/value head after another is computed."""
    B, m, N, d = shape_BmNd
    J, blocks = next(x.shape[2] // d for x in given if x.ndim == 3), m // BLOCK

    def spec(x: Any) -> pl.BlockSpec:
        if len(x.shape) == 4:
            return pl.BlockSpec((1, N // J, BLOCK, d), lambda b, i, j, _: (b, j, i, 0))
        if len(x.shape) == 3:
            return pl.BlockSpec((x.shape[0], BLOCK, d), lambda b, i, j, _: (0, b * blocks + i, j))
        if x.shape[1] == N:
            return pl.BlockSpec((BLOCK, N), lambda b, i, j, _: (b * blocks + i, 0))
        return pl.BlockSpec((BLOCK, N // J * d), lambda b, i, j, _: (b * blocks + i, j))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B, blocks, J),
        in_specs=[spec(x) for x in given],
        out_specs=[spec(x) for x in shapes],
    )
    call = pl.pallas_call(kernel, grid_spec=grid, out_shape=shapes, interpret=interpret, name="own_keys")
    return call(k.reshape(1), *given)


def _wide(ref: Any, *at: Any) -> jax.Array:
    return ref[at].astype(jnp.float32)


def _column(x_cN: jax.Array, n: jax.Array) -> jax.Array:
    """[c, 1]."""
    return jnp.where(_is(x_cN, n), x_cN, 0.0).sum(1, keepdims=True)


def _is(x_cN: jax.Array, n: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_cN.shape, 1) == n


def _shares(scale: float, k_ref, lse_c1, q_cd, keys_ref) -> tuple:
    """(p of what is summed up [c, 1], those of the own keys of steps 1.. [c, 1])."""
    scores = []
    for step in range(1, keys_ref.shape[0]):
        s = (q_cd * _wide(keys_ref, step)).sum(1, keepdims=True) * scale
        scores.append(jnp.where(step <= k_ref[0], s, MASKED))
    top = lse_c1
    for s in scores:
        top = jnp.maximum(top, s)
    first, others = jnp.exp(lse_c1 - top), [jnp.exp(s - top) for s in scores]
    total = sum(others, first)
    return first / total, [x / total for x in others]


def _read(scale: float, k_ref, base_ref, lse_ref, q_ref, keys_ref, values_ref, out_ref) -> None:
    group, d = q_ref.shape[1], q_ref.shape[3]
    lse_cN = lse_ref[...]
    for g in range(group):
        lse_c1 = _column(lse_cN, pl.program_id(2) * group + g)
        first, others = _shares(scale, k_ref, lse_c1, _wide(q_ref, 0, g), keys_ref)
        out = first * _wide(base_ref, 0, g)
        for step, share in enumerate(others, 1):
            out += share * _wide(values_ref, step)
        out_ref[:, g * d : (g + 1) * d] = out.astype(out_ref.dtype)


def _read_back(
    scale: float, k_ref, base_ref, lse_ref, q_ref, keys_ref, values_ref, g_ref,
    d_base_ref, d_lse_ref, dq_ref, dk_ref, dv_ref,
) -> None:  # fmt: skip
    group, d, steps = q_ref.shape[1], q_ref.shape[3], range(1, keys_ref.shape[0])
    j, lse_cN = pl.program_id(2), lse_ref[...]
    d_lse_cN = jnp.where(j == 0, 0.0, d_lse_ref[...])  # of the heads before
    dk, dv = ([0.0] * len(steps) for _ in range(2))
    for number in range(group):
        n = j * group + number
        q, g = _wide(q_ref, 0, number), _wide(g_ref, slice(None), slice(number * d, (number + 1) * d))
        first, others = _shares(scale, k_ref, _column(lse_cN, n), q, keys_ref)
        of_first = (g * _wide(base_ref, 0, number)).sum(1, keepdims=True)
        of_others = [(g * _wide(values_ref, step)).sum(1, keepdims=True) for step in steps]
        mean = sum((p * x for p, x in zip(others, of_others, strict=True)), first * of_first)
        ds = [p * (x - mean) * scale for p, x in zip(others, of_others, strict=True)]
        d_lse_cN += jnp.where(_is(lse_cN, n), first * (of_first - mean), 0.0)
        d_base_ref[0, number] = (first * g).astype(d_base_ref.dtype)
        dq = sum((s * _wide(keys_ref, step) for step, s in zip(steps, ds, strict=True)), jnp.zeros_like(q))
        dq_ref[0, number] = dq.astype(dq_ref.dtype)
        dk = [x + s * q for x, s in zip(dk, ds, strict=True)]
        dv = [x + p * g for x, p in zip(dv, others, strict=True)]
    for ref, sums in ((dk_ref, dk), (dv_ref, dv)):
        ref[0] = jnp.zeros(ref.shape[1:], ref.dtype)
        for step, x in zip(steps, sums, strict=True):
            ref[step] = x.astype(ref.dtype)
    d_lse_ref[...] = d_lse_cN
