"""A DeltaNet layer between its projections as one TPU kernel: convolution, gated delta rule, gated norm.

XLA writes every triangular system and each step of its inversion to memory in float32; here a chunk of a key
head and of its value heads stays in fast memory, and only projections are read and results written. Formulas
and rounding are those of deltanet.py and deltarule.py.

Dimensions: B rows, T positions, Z chunks of C positions, K key heads (h of a block), G value heads of each,
D of a key and of a value, P = G * C: a chunk's positions once for every value head, one head after another.
"""

import math
from collections.abc import Generator, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dump.target.deltarule import CHUNK, crossings

LANES = 128
ROWS = 512  # positions of a block
HEADS = 8  # key heads of a block: while one waits for a matmul, others compute
_TILE = 8  # rows of a register
_SIZES = [_TILE << n for n in range((CHUNK // _TILE).bit_length() - 1)]  # of blocks that are joined in pairs
_F32 = jnp.float32


def serves(mixed_BTM: jax.Array, key_dim: int, value_dim: int, group: int, taps: int) -> bool:
    """Whether the kernel takes such a layer: heads as wide as registers, positions in whole chunks."""
    whole = key_dim == value_dim == LANES and group * CHUNK % LANES == 0 and mixed_BTM.shape[1] % CHUNK == 0
    return mixed_BTM.dtype == jnp.bfloat16 and whole and taps <= _TILE + 1


def mix(
    eps: float,
    unit_eps: float,
    mixed_BTM: jax.Array,
    beta_BTKG: jax.Array,
    decay_BTKG: jax.Array,
    taps_XKc: jax.Array,
    norm_D: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """[B, T, K * G * D] in the type of `mixed`, which holds [q D, k D, v G*D, gate G*D] a key head.

    `taps` [X, K, 2 D + G D] is the convolution's kernel over q, k and v, the position's own last.
    """
    B, T = segments_BT.shape
    K, G = beta_BTKG.shape[2:]
    h, rows, D = math.gcd(K, HEADS), math.gcd(T, ROWS), LANES
    chunks, width, convolved = rows // CHUNK, (2 + 2 * G) * D, (2 + G) * D
    columns, lanes = _scalars(beta_BTKG, decay_BTKG, segments_BT, len(taps_XKc), h)

    def by_heads(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, h * size), lambda b, n, t: (b, t, n))

    return pl.pallas_call(
        partial(_block, G, len(taps_XKc), eps, unit_eps),
        grid=(B, K // h, T // rows),
        in_specs=[
            by_heads(width),
            pl.BlockSpec((None, None, rows, columns.shape[-1]), lambda b, n, t: (b, n, t, 0)),
            pl.BlockSpec((None, h, chunks, *lanes.shape[-2:]), lambda b, n, t: (b, n, t, 0, 0)),
            pl.BlockSpec((len(taps_XKc), h * convolved), lambda b, n, t: (0, n)),
            pl.BlockSpec((1, D), lambda b, n, t: (0, 0)),
        ],
        out_specs=by_heads(G * D),
        out_shape=jax.ShapeDtypeStruct((B, T, K * G * D), mixed_BTM.dtype),
        scratch_shapes=[pltpu.VMEM((h, G, D, D), _F32), pltpu.VMEM((h, _TILE, convolved), _F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="delta_net",
        interpret=interpret,
    )(mixed_BTM, columns, lanes, taps_XKc.astype(_F32).reshape(len(taps_XKc), -1), norm_D.astype(_F32)[None])


def _scalars(beta_BTKG, decay_BTKG, segments_BT, taps: int, h: int) -> tuple[jax.Array, jax.Array]:
    """What there is one of a position: ([B, K/h, T, h * n] with a position a register's row, [B, K, Z, 3, P]
    with one a lane)."""
    (B, T), (K, G) = segments_BT.shape, beta_BTKG.shape[2:]
    Z = T // CHUNK
    segments_ZBC = segments_BT.reshape(B, Z, CHUNK).swapaxes(0, 1)
    reads, writes, survives = (x.transpose(1, 0, 3, 2, 4) for x in crossings(segments_ZBC))
    decay_BZCKG = decay_BTKG.reshape(B, Z, CHUNK, K, G)
    total = jnp.cumsum(decay_BZCKG, 2)
    into = jnp.exp(total) * reads
    out_of = jnp.exp(total[:, :, -1:] - total) * writes
    kept = jnp.exp(total[:, :, -1:]) * survives
    by_head = jnp.concatenate([beta_BTKG.reshape(total.shape), total, into, out_of], -1)
    behind = [jnp.pad(segments_BT, ((0, 0), (n, 0)), constant_values=-1)[:, :T] for n in range(1, taps)]
    every = jnp.stack([x.astype(_F32) for x in (segments_BT, *(x == segments_BT for x in behind))], -1)
    every = jnp.broadcast_to(every[:, :, None], (B, T, K, taps))
    columns = jnp.concatenate([by_head.reshape(B, T, K, -1), every], -1)
    columns = columns.reshape(B, T, K // h, -1).swapaxes(1, 2)
    segments = segments_BT.reshape(B, Z, CHUNK, 1, 1).astype(_F32)
    lanes = jnp.stack([jnp.broadcast_to(x, total.shape) for x in (total, segments, kept)], 2)
    return columns, lanes.transpose(0, 4, 1, 2, 5, 3).reshape(B, K, Z, 3, G * CHUNK)


def _block(
    G: int, taps: int, eps: float, unit_eps: float, mixed_ref, columns_ref, lanes_ref, taps_ref, norm_ref,
    out_ref, state_ref, tail_ref,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = jnp.zeros_like(state_ref)
        tail_ref[...] = jnp.zeros_like(tail_ref)

    h, chunks = lanes_ref.shape[:2]
    masks = _masks(G)

    def of_head(head: int, i: Any) -> Iterator[None]:
        rows = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
        width, size, convolved = mixed_ref.shape[1] // h, columns_ref.shape[1] // h, (2 + G) * LANES
        given = [columns_ref[rows, head * size + n : head * size + n + 1] for n in range(size)]
        parts = []
        for start in range(0, convolved, LANES):
            own, at = slice(start, start + LANES), head * width + start
            x_CD = mixed_ref[rows, at : at + LANES].astype(_F32)
            weights = taps_ref[:, head * convolved + start : head * convolved + start + LANES]
            parts.append(_convolved(x_CD, tail_ref.at[head, :, own], weights, given[4 * G + 1 :]))
            yield
        out = yield from _rule(G, unit_eps, masks, parts, given, lanes_ref[head, i], state_ref.at[head])
        for g in range(G):
            own = out[g * CHUNK : (g + 1) * CHUNK].astype(out_ref.dtype).astype(_F32)
            own = own * jax.lax.rsqrt(jnp.mean(own * own, -1, keepdims=True) + eps) * norm_ref[...]
            at = head * width + convolved + g * LANES
            gate = _silu(mixed_ref[rows, at : at + LANES].astype(_F32))
            found = own.astype(out_ref.dtype).astype(_F32) * gate
            at = (head * G + g) * LANES
            out_ref[rows, at : at + LANES] = found.astype(out_ref.dtype)
            yield

    def chunk(i: Any, _: Any) -> None:
        # Heads take turns: while one waits for a matmul, there is work of another in its place.
        for _ in zip_longest(*(of_head(head, i) for head in range(h))):
            pass

    jax.lax.fori_loop(0, chunks, chunk, None)


def _masks(G: int) -> tuple[jax.Array, list[jax.Array]]:
    """[P, P]: whether i comes after j or is j, and the corners that are left when the blocks of the diagonal
    double from 8 to C."""
    P = G * CHUNK
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (P, P), axis) for axis in (0, 1))

    def blocks(size: int) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.lax.shift_right_logical(x, jnp.full_like(x, size.bit_length() - 1)) for x in (i, j))

    def corner(size: int) -> jax.Array:
        (of_i, of_j), (above_i, above_j) = blocks(size), blocks(2 * size)
        return (of_i == of_j + 1) & (above_i == above_j)

    of_i, of_j = blocks(CHUNK)
    return (i >= j) & (of_i == of_j), [corner(size) for size in _SIZES]


def _convolved(x_CD: jax.Array, tail_ref: Any, taps_XD: jax.Array, same: list[jax.Array]) -> jax.Array:
    """silu of the causal convolution [C, D], in bfloat16; the last positions are kept for the next."""
    both = jnp.concatenate([tail_ref[...], x_CD])
    tail_ref[...] = x_CD[-_TILE:]
    total = x_CD * taps_XD[-1:]
    for back, mask_C1 in enumerate(same, 1):
        shifted = both[_TILE - back : _TILE - back + CHUNK]
        total += shifted * taps_XD[-1 - back : len(taps_XD) - back] * mask_C1
    return _silu(total).astype(jnp.bfloat16)


def _silu(x: jax.Array) -> jax.Array:
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def _rule(G: int, unit_eps: float, masks, parts_CD, given, lanes_3P, state_ref) -> Generator:
    """The delta rule's results [P, D] in float32, step by step."""
    dtype = parts_CD[0].dtype

    def of_heads(start: int) -> jax.Array:
        return jnp.concatenate(given[start : start + G])

    beta, total, into, out_of = (of_heads(n * G) for n in range(4))
    later, corners = masks
    seen = later & (jnp.concatenate([given[4 * G]] * G) == lanes_3P[1:2])
    within = jnp.exp(jnp.where(seen, total - lanes_3P[0:1], -jnp.inf))
    yield
    q, k = (_unit(x, scale, unit_eps) for x, scale in zip(parts_CD, (LANES**-0.5, 1.0), strict=False))
    q, k, v = jnp.concatenate([q] * G), jnp.concatenate([k] * G), jnp.concatenate(parts_CD[2:])
    system = _dot(k, k, 1, 1) * beta * within
    yield
    attention = (_dot(q, k, 1, 1) * within).astype(dtype)
    yield
    inverse = yield from _inverse(system, corners)
    k32 = k.astype(_F32)
    both = jnp.concatenate([v.astype(_F32) * beta, k32 * (jnp.exp(total) * beta)], 1).astype(dtype)
    solved = _dot(inverse, both)
    yield
    # `into` is exp(total) where the state before the chunk is read; the keys have that factor already.
    old_keys = (solved[:, LANES:] * (into > 0).astype(_F32)).astype(dtype)
    queries, keys = ((x * scale).astype(dtype) for x, scale in ((q.astype(_F32), into), (k32, out_of)))
    owns = [slice(g * CHUNK, (g + 1) * CHUNK) for g in range(G)]
    read = [
        _dot(jnp.concatenate([old_keys[own], queries[own]]), state_ref[g].astype(dtype))
        for g, own in enumerate(owns)
    ]
    yield
    values = (solved[:, :LANES] - jnp.concatenate([x[:CHUNK] for x in read])).astype(dtype)
    for g, own in enumerate(owns):
        kept = lanes_3P[2:3, own.start : own.start + 1]
        state_ref[g] = state_ref[g] * kept + _dot(keys[own], values[own], 0, 0)
        yield
    return jnp.concatenate([x[CHUNK:] for x in read]) + _dot(attention, values)


def _unit(x: jax.Array, scale: float, eps: float) -> jax.Array:
    x32 = x.astype(_F32)
    return (x32 * (scale * jax.lax.rsqrt((x32 * x32).sum(-1, keepdims=True) + eps))).astype(x.dtype)


def _inverse(system_PP: jax.Array, corners: list[jax.Array]) -> Generator:
    """Inverse in bfloat16 of a lower triangle with ones on its diagonal, whatever is stored on and above it.

    Blocks of a register's rows are inverted row by row, then joined in ever larger ones: that of
    [[A, 0], [R, B]] is [[A', 0], [-B' R A', B']].
    """
    P = len(system_PP)
    i = jax.lax.broadcasted_iota(jnp.int32, (_TILE, P), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (_TILE, P), 1)
    starts = range(0, P, _TILE)
    found = [(lane == i + start).astype(_F32) for start in starts]
    below = [jnp.where(lane - start < i, system_PP[start : start + _TILE], 0.0) for start in starts]
    for j in range(_TILE - 1):
        for n, start in enumerate(starts):
            found[n] -= below[n][:, start + j : start + j + 1] * found[n][j : j + 1]
        yield
    inverse = jnp.concatenate(found)
    for size, corner in zip(_SIZES, corners, strict=True):
        lower = [slice(at, at + size) for at in range(size, P, 2 * size)]
        own = jnp.concatenate([inverse[part] for part in lower])
        own = _exact(own, jnp.where(corner, system_PP, 0.0))
        yield
        less = _exact(own, inverse)
        yield
        parts = []
        for n, part in enumerate(lower):
            upper = inverse[part.start - size : part.start]
            parts += [upper, inverse[part] - less[n * size : (n + 1) * size]]
        inverse = jnp.concatenate(parts)
    return inverse.astype(jnp.bfloat16)


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
    """a times b of float32, of which the product of what bfloat16 leaves of both is dropped."""
    (high, low), (b_high, b_low) = _halves(a), _halves(b)
    return _dot(jnp.concatenate([high, low, high], 1), jnp.concatenate([b_high, b_high, b_low]))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(_F32)).astype(jnp.bfloat16)


def _dot(a: jax.Array, b: jax.Array, of_a: int = 1, of_b: int = 0) -> jax.Array:
    """a times b over these dimensions, summed in float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=_F32)
