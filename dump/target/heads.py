"""Heads of a projection as attention reads them: cut, normed, rotated.

A TPU does it in one kernel, which reads the projection once and writes the heads once; XLA would go over them
four times.

Dimensions: B rows, T positions, N heads, D head_dim, M = N * D, R half of the rotated dimensions; g heads of
a block.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from common.layers import apply_rope, rms_norm, rope_matrices, wide_tables
from dump.target.spec import Norm

LANES = 128  # a head's dimensions must be a multiple of it
ROWS, WIDTH = 1024, 512  # positions and columns of a block
_TILE = 8  # positions of a TPU's tile

Tables = tuple[jax.Array, jax.Array]  # cos, sin [B, T, R]


def heads_of(x_BTM: jax.Array, size: int) -> jax.Array:
    """[B, N, T, size] of a projection [B, T, N * size]: head by head.

    Whole tiles of positions change places, which a TPU does while it reads them. The barrier: what follows
    reads the projection more than once, and XLA would keep it in float32.
    """
    x_BTM = jax.lax.optimization_barrier(x_BTM)
    B, T = x_BTM.shape[:2]
    tile = _TILE if T % _TILE == 0 else 1
    tiles = x_BTM.reshape(B, T // tile, tile, -1, size).transpose(0, 3, 1, 2, 4)
    return tiles.reshape(B, -1, T, size)


def rotated(
    x_BTM: jax.Array,
    size: int,
    tables: Tables,
    start: int = 0,
    norm: Norm | None = None,
    weight_D: jax.Array | None = None,
) -> jax.Array:
    """`heads_of`, every head normed if a norm is given, then its dimensions from `start` on rotated."""
    given = (x_BTM, *tables) if norm is None else (x_BTM, *tables, weight_D)
    ways = {"default": partial(_by_xla, size, start, norm)}
    if x_BTM.dtype == jnp.bfloat16 and size % LANES == 0 and x_BTM.shape[1] % LANES == 0:
        ways["tpu"] = partial(by_kernel, size, start, norm)
    return jax.lax.platform_dependent(*given, **ways)


def _by_xla(size: int, start: int, norm: Norm | None, x_BTM, cos, sin, weight_D=None) -> jax.Array:
    x_BNTD = heads_of(x_BTM, size)
    if norm:
        x_BNTD = rms_norm(x_BNTD, weight_D, norm.eps, norm.offset)
    return apply_rope(x_BNTD, (cos, sin), heads=1, start=start)


def by_kernel(
    size: int, start: int, norm: Norm | None, x_BTM, cos, sin, weight_D=None, interpret: bool = False
) -> jax.Array:
    """The same; `interpret` runs the kernel's steps one by one, on any device."""
    B, T, M = x_BTM.shape
    N, D, rows = M // size, size, math.gcd(T, ROWS)
    g = max(n for n in range(1, max(1, WIDTH // D) + 1) if N % n == 0)
    _, turn_DD = rope_matrices(D, 2 * cos.shape[-1], start)
    scale_D = jnp.ones(D, jnp.float32) if norm is None else weight_D.astype(jnp.float32) + norm.offset
    table = pl.BlockSpec((None, rows, D), lambda b, t, n: (b, t, 0))
    return pl.pallas_call(
        partial(_block, D, norm and norm.eps),
        grid=(B, T // rows, N // g),
        in_specs=[
            pl.BlockSpec((None, rows, g * D), lambda b, t, n: (b, t, n)),
            pl.BlockSpec((1, D), lambda b, t, n: (0, 0)),
            table,
            table,
            pl.BlockSpec((D, D), lambda b, t, n: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, g, rows, D), lambda b, t, n: (b, n, t, 0)),
        out_shape=jax.ShapeDtypeStruct((B, N, T, D), x_BTM.dtype),
        name="rotated_heads",
        interpret=interpret,
    )(x_BTM, scale_D[None], *wide_tables(cos, sin, D, start), jnp.asarray(turn_DD, x_BTM.dtype))


def _block(D: int, eps: float | None, x_ref, scale_ref, cos_ref, sin_ref, turn_ref, out_ref) -> None:
    for head in range(out_ref.shape[0]):
        x = x_ref[:, head * D : (head + 1) * D]
        if eps is not None:
            x32 = x.astype(jnp.float32)
            x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
            x = (x32 * scale_ref[...]).astype(x.dtype)
        turned = jax.lax.dot(x, turn_ref[...], preferred_element_type=jnp.float32)
        found = x.astype(jnp.float32) * cos_ref[...] + turned * sin_ref[...]
        out_ref[head] = found.astype(out_ref.dtype)
