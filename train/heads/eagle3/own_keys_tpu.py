"""The kernels of own_keys.py for TPU, where the formulas are: a block of indices at a time in fast memory.

Everything is [indices, d] here, one head after another: a register holds 128 numbers of d for 8 indices.
Dimensions as there; c indices of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK = 64  # indices
_MASKED = -1e30


def serves(x_CNd: jax.Array) -> bool:
    """Whether the kernels take such arrays: heads as wide as registers, indices in whole blocks."""
    return x_CNd.dtype == jnp.bfloat16 and x_CNd.shape[2] % LANES == 0 and x_CNd.shape[0] % BLOCK == 0


def read(scale: float, base_CNd, lse_CN, q_CNd, own, k, interpret: bool = False) -> jax.Array:
    """What `join` gives."""
    shapes = (jax.ShapeDtypeStruct(_flat(base_CNd).shape, base_CNd.dtype),)
    (out,) = _call(partial(_read, scale), shapes, own, k, (base_CNd, lse_CN, q_CNd), interpret)
    return out.reshape(base_CNd.shape)


def read_back(scale: float, g_CNd, base_CNd, lse_CN, q_CNd, own, k, interpret: bool = False) -> tuple:
    """The cotangents of `base`, `lse`, `q` and `own`."""
    given = g_CNd, base_CNd, lse_CN, q_CNd
    results = base_CNd, lse_CN, q_CNd, *own
    shapes = tuple(jax.ShapeDtypeStruct(_flat(x).shape, x.dtype) for x in results)
    found = _call(partial(_read_back, scale), shapes, own, k, given, interpret)
    d_base, d_lse, dq, *d_own = (x.reshape(like.shape) for x, like in zip(found, results, strict=True))
    return d_base, d_lse, dq, tuple(d_own)


def _flat(x: jax.Array) -> jax.Array:
    """Heads beside each other: [C, N, d] -> [C, N d], [K, C, J, d] -> [K, C, J d]."""
    return x if x.ndim == 2 else x.reshape(*x.shape[:-2], -1)


def _call(kernel: Any, shapes: tuple, own: Any, k: jax.Array, given: tuple, interpret: bool) -> tuple:
    arrays = [_flat(x) for x in (*given, *own)]

    def spec(x: Any) -> pl.BlockSpec:
        if len(x.shape) == 2:
            return pl.BlockSpec((BLOCK, x.shape[1]), lambda i, _: (i, 0))
        return pl.BlockSpec((x.shape[0], BLOCK, x.shape[2]), lambda i, _: (0, i, 0))

    d = given[0].shape[2]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(given[0].shape[0] // BLOCK,),
        in_specs=[spec(x) for x in arrays],
        out_specs=[spec(x) for x in shapes],
    )
    call = pl.pallas_call(
        partial(kernel, d), grid_spec=grid, out_shape=shapes, interpret=interpret, name="own_keys"
    )
    return call(k.reshape(1), *arrays)


def _heads(ref: Any, d: int) -> range:
    return range(ref.shape[-1] // d)


def _head(ref: Any, n: int, d: int, *step: int) -> jax.Array:
    return ref[(*step, slice(None), slice(n * d, (n + 1) * d))].astype(jnp.float32)


def _column(x_cN: jax.Array, n: int) -> jax.Array:
    """[c, 1]."""
    return jnp.where(_is(x_cN, n), x_cN, 0.0).sum(1, keepdims=True)


def _is(x_cN: jax.Array, n: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, x_cN.shape, 1) == n


def _shares(scale: float, d: int, k_ref, lse_cN, q_cd, keys_ref, n: int, j: int) -> tuple:
    """(p of what is summed up [c, 1], those of the own keys of steps 1.. [c, 1])."""
    lse = _column(lse_cN, n)
    scores = []
    for step in range(1, keys_ref.shape[0]):
        s = (q_cd * _head(keys_ref, j, d, step)).sum(1, keepdims=True) * scale
        scores.append(jnp.where(step <= k_ref[0], s, _MASKED))
    top = lse
    for s in scores:
        top = jnp.maximum(top, s)
    first, others = jnp.exp(lse - top), [jnp.exp(s - top) for s in scores]
    total = sum(others, first)
    return first / total, [x / total for x in others]


def _read(scale: float, d: int, k_ref, base_ref, lse_ref, q_ref, keys_ref, values_ref, out_ref) -> None:
    group = len(_heads(q_ref, d)) // len(_heads(keys_ref, d))
    lse_cN = lse_ref[...]
    for n in _heads(q_ref, d):
        j = n // group
        first, others = _shares(scale, d, k_ref, lse_cN, _head(q_ref, n, d), keys_ref, n, j)
        out = first * _head(base_ref, n, d)
        for step, share in enumerate(others, 1):
            out += share * _head(values_ref, j, d, step)
        out_ref[:, n * d : (n + 1) * d] = out.astype(out_ref.dtype)


def _read_back(
    scale: float, d: int, k_ref, g_ref, base_ref, lse_ref, q_ref, keys_ref, values_ref,
    d_base_ref, d_lse_ref, dq_ref, dk_ref, dv_ref,
) -> None:  # fmt: skip
    group = len(_heads(q_ref, d)) // len(_heads(keys_ref, d))
    lse_cN = lse_ref[...]
    d_lse_cN = jnp.zeros_like(lse_cN)
    for j in _heads(keys_ref, d):
        dk, dv = ([0.0] * (keys_ref.shape[0] - 1) for _ in range(2))
        for n in range(j * group, (j + 1) * group):
            here = slice(n * d, (n + 1) * d)
            q, g = _head(q_ref, n, d), _head(g_ref, n, d)
            first, others = _shares(scale, d, k_ref, lse_cN, q, keys_ref, n, j)
            of_first = (g * _head(base_ref, n, d)).sum(1, keepdims=True)
            of_others = [
                (g * _head(values_ref, j, d, step)).sum(1, keepdims=True)
                for step in range(1, values_ref.shape[0])
            ]
            mean = sum((p * x for p, x in zip(others, of_others, strict=True)), first * of_first)
            ds = [p * (x - mean) * scale for p, x in zip(others, of_others, strict=True)]
            d_lse_cN += jnp.where(_is(lse_cN, n), first * (of_first - mean), 0.0)
            d_base_ref[:, here] = (first * g).astype(d_base_ref.dtype)
            dq = sum(s * _head(keys_ref, j, d, step) for step, s in enumerate(ds, 1))
            dq_ref[:, here] = (dq + jnp.zeros_like(q)).astype(dq_ref.dtype)
            dk = [x + s * q for x, s in zip(dk, ds, strict=True)]
            dv = [x + p * g for x, p in zip(dv, others, strict=True)]
        here = slice(j * d, (j + 1) * d)
        for ref, sums in ((dk_ref, dk), (dv_ref, dv)):
            ref[0, :, here] = jnp.zeros((ref.shape[1], d), ref.dtype)
            for step, x in enumerate(sums, 1):
                ref[step, :, here] = x.astype(ref.dtype)
    d_lse_ref[...] = d_lse_cN
