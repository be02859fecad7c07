"""A DeltaNet layer between its projections as one TPU kernel: convolution, gated delta rule, gated norm.

XLA writes every triangular system and each step of its inversion to memory in float32; here a chunk of a key
head and of its value heads stays in fast memory, and only projections are read and results written. Formulas
and rounding are those of deltanet.py and deltarule.py.

Dimensions: B rows, T positions, C of a chunk, K key heads (h of a block), G value heads of each, D of a key
and of a value, P = G * C: a chunk's positions once for every value head, one head after another.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
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
CYCLES = 980  # of a v6e for a chunk of a key head: as many instructions as the loop has
_FLOPS_A_CYCLE = 2 * 4 * 256 * 256  # of a v6e
_TILE = 8  # rows of a register
_SIZES = [_TILE << n for n in range((CHUNK // _TILE).bit_length() - 1)]  # of blocks that are joined in pairs
_F32 = jnp.float32


def serves(mixed_BTM: jax.Array, key_dim: int, value_dim: int, group: int, taps: int) -> bool:
    """Whether the kernel takes such a layer: heads as wide as registers, positions in whole chunks."""
    wide = key_dim == value_dim == LANES and group * CHUNK % LANES == 0 and HEADS * 2 * group < LANES
    whole = mixed_BTM.shape[1] % CHUNK == 0 and taps <= _TILE + 1
    return mixed_BTM.dtype == jnp.bfloat16 and wide and whole


def mix(
    eps: float,
    unit_eps: float,
    mixed_BTM: jax.Array,
    rates_BTKr: jax.Array,
    bias_KG: jax.Array,
    speed_KG: jax.Array,
    taps_XKc: jax.Array,
    norm_D: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """[B, T, K * G * D] in the type of `mixed`, which holds [q D, k D, v G*D, gate G*D] a key head.

    `rates` hold [beta G, decay G] a key head: beta is the sigmoid of the first, the decay `speed` times the
    softplus of the second and `bias`. `taps` [X, K, 2 D + G D] is the convolution's kernel over q, k and v,
    the position's own last.
    """
    (B, T), (K, G), X, D = segments_BT.shape, bias_KG.shape, len(taps_XKc), LANES
    h, rows = math.gcd(K, HEADS), math.gcd(T, ROWS)
    width, convolved = (2 + 2 * G) * D, (2 + G) * D
    rates = rates_BTKr.reshape(B, T, K // h, -1).swapaxes(1, 2).astype(_F32)
    marks, own = _marks(segments_BT, X), jnp.stack([bias_KG.astype(_F32), speed_KG])
    own = jnp.pad(own, ((0, 0), (0, 0), (G, 0))).reshape(2, K // h, -1).swapaxes(0, 1)

    # Most instructions do not multiply: the compiler, which looks for work beside collectives, is told of as
    # many FLOPs as the kernel's time would be enough for.
    moved = (1 + G / width * LANES) * mixed_BTM.size * mixed_BTM.dtype.itemsize
    cost = pl.CostEstimate(
        flops=B * T // CHUNK * K * CYCLES * _FLOPS_A_CYCLE, transcendentals=0, bytes_accessed=int(moved)
    )

    def by_heads(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, h * size), lambda b, n, t: (b, t, n))

    return pl.pallas_call(
        partial(_block, G, h, eps, unit_eps),
        grid=(B, K // h, T // rows),
        in_specs=[
            by_heads(width),
            pl.BlockSpec((None, None, rows, rates.shape[-1]), lambda b, n, t: (b, n, t, 0)),
            pl.BlockSpec((None, 2, own.shape[-1]), lambda b, n, t: (n, 0, 0)),
            pl.BlockSpec((None, rows, marks.shape[-1]), lambda b, n, t: (b, t, 0)),
            pl.BlockSpec((X, h * convolved), lambda b, n, t: (0, n)),
            pl.BlockSpec((1, D), lambda b, n, t: (0, 0)),
        ],
        out_specs=by_heads(G * D),
        out_shape=jax.ShapeDtypeStruct((B, T, K * G * D), mixed_BTM.dtype),
        scratch_shapes=[pltpu.VMEM((h, G, D, D), _F32), pltpu.VMEM((h, _TILE, convolved), _F32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost,
        name="delta_net",
        interpret=interpret,
    )(mixed_BTM, rates, own, marks, taps_XKc.astype(_F32).reshape(X, -1), norm_D.astype(_F32)[None])


def _marks(segments_BT: jax.Array, taps: int) -> jax.Array:
    """float32 [B, T, 3 + taps]: a position's document, whether it reads the state before its chunk and writes
    that behind it, whether this survives the chunk, and whether each of the positions in front of it that the
    convolution reads is of its document."""
    B, T = segments_BT.shape
    found = crossings(segments_BT.reshape(B, -1, CHUNK).swapaxes(0, 1))
    by_chunk = [jnp.broadcast_to(x, found[0].shape).transpose(1, 0, 3, 2, 4).reshape(B, T) for x in found]
    behind = [jnp.pad(segments_BT, ((0, 0), (n, 0)), constant_values=-1)[:, :T] for n in range(1, taps)]
    return jnp.stack(
        [x.astype(_F32) for x in (segments_BT, *by_chunk, *(x == segments_BT for x in behind))], -1
    )


@dataclass(frozen=True)
class _Scalars:
    """What there is one of a position and a value head: [C, n], where a key head's numbers are those of its G
    value heads for beta, then those for the decay.

    `total`: sums of decays from the chunk's first position on; `grown`: their exponentials; `into` and
    `out_of`: the factors of what a position reads of the state before the chunk and writes to that behind it;
    `kept` [1, n]: of the state itself; `turned` [LANES, C]: `total`, and in the last row the documents.
    """

    beta: jax.Array
    total: jax.Array
    grown: jax.Array
    into: jax.Array
    out_of: jax.Array
    kept: jax.Array
    turned: jax.Array


def _scalars(rates: jax.Array, own_2r: jax.Array, marks: jax.Array) -> _Scalars:
    x = rates + own_2r[0:1]
    softplus = jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    total, step = own_2r[1:2] * softplus, 1
    while step < CHUNK:  # sums over all positions up to each
        total += jnp.concatenate([jnp.zeros_like(total[:step]), total[:-step]])
        step *= 2
    last, grown = total[-1:], jnp.exp(total)
    filled = jnp.zeros((CHUNK, LANES - 1 - total.shape[1]), _F32)
    return _Scalars(
        beta=0.5 + 0.5 * jnp.tanh(0.5 * rates),
        total=total,
        grown=grown,
        into=grown * marks[:, 1:2],
        out_of=jnp.exp(last - total) * marks[:, 2:3],
        kept=jnp.exp(last) * marks[:1, 3:4],
        turned=jnp.concatenate([total, filled, marks[:, :1]], 1).T,
    )


def _block(
    G: int, h: int, eps: float, unit_eps: float, mixed_ref, rates_ref, own_ref, marks_ref, taps_ref, norm_ref,
    out_ref, state_ref, tail_ref,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = jnp.zeros_like(state_ref)
        tail_ref[...] = jnp.zeros_like(tail_ref)

    masks = _masks(G)
    width, convolved = (2 + 2 * G) * LANES, (2 + G) * LANES

    def of_head(head: int, rows: Any, marks: jax.Array, scalars: _Scalars) -> Iterator[None]:
        parts = []
        for start in range(0, convolved, LANES):
            own, at = slice(start, start + LANES), head * width + start
            x_CD = mixed_ref[rows, at : at + LANES].astype(_F32)
            weights = taps_ref[:, head * convolved + start : head * convolved + start + LANES]
            parts.append(_convolved(x_CD, tail_ref.at[head, :, own], weights, marks[:, 4:]))
            yield
        out = yield from _rule(G, head, unit_eps, masks, parts, marks[:, :1], scalars, state_ref.at[head])
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
        rows = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
        marks = marks_ref[rows]
        shared = rows, marks, _scalars(rates_ref[rows], own_ref[...], marks)
        # Heads take turns: while one waits for a matmul, there is work of another in its place.
        for _ in zip_longest(*(of_head(head, *shared) for head in range(h))):
            pass

    jax.lax.fori_loop(0, mixed_ref.shape[0] // CHUNK, chunk, None)


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


def _convolved(x_CD: jax.Array, tail_ref: Any, taps_XD: jax.Array, same: jax.Array) -> jax.Array:
    """silu of the causal convolution [C, D], in bfloat16; the last positions are kept for the next."""
    both = jnp.concatenate([tail_ref[...], x_CD])
    tail_ref[...] = x_CD[-_TILE:]
    total = x_CD * taps_XD[-1:]
    for back in range(1, len(taps_XD)):
        shifted = both[_TILE - back : _TILE - back + CHUNK]
        total += shifted * taps_XD[-1 - back : len(taps_XD) - back] * same[:, back - 1 : back]
    return _silu(total).astype(jnp.bfloat16)


def _silu(x: jax.Array) -> jax.Array:
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def _rule(G: int, head: int, unit_eps: float, masks, parts_CD, segments_C1, scalars, state_ref) -> Generator:
    """The delta rule's results [P, D] in float32, step by step."""
    dtype = parts_CD[0].dtype
    first = head * 2 * G

    def column(x: jax.Array, start: int) -> jax.Array:
        return jnp.concatenate([x[:, n : n + 1] for n in range(start, start + G)])

    beta = column(scalars.beta, first)
    columns = (scalars.total, scalars.grown, scalars.into, scalars.out_of)
    total, grown, into, out_of = (column(x, first + G) for x in columns)
    total_1P = jnp.concatenate([scalars.turned[n : n + 1] for n in range(first + G, first + 2 * G)], 1)
    segments_1P = jnp.concatenate([scalars.turned[-1:]] * G, 1)
    later, corners = masks
    seen = later & (jnp.concatenate([segments_C1] * G) == segments_1P)
    within = jnp.exp(jnp.where(seen, total - total_1P, -jnp.inf))
    yield
    q, k = (_unit(x, scale, unit_eps) for x, scale in zip(parts_CD, (LANES**-0.5, 1.0), strict=False))
    q, k, v = jnp.concatenate([q] * G), jnp.concatenate([k] * G), jnp.concatenate(parts_CD[2:])
    system = _dot(k, k, 1, 1) * beta * within
    yield
    attention = (_dot(q, k, 1, 1) * within).astype(dtype)
    yield
    inverse = yield from _inverse(system, corners)
    k32 = k.astype(_F32)
    both = jnp.concatenate([v.astype(_F32) * beta, k32 * (grown * beta)], 1).astype(dtype)
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
        kept = scalars.kept[:, first + G + g : first + G + g + 1]
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
