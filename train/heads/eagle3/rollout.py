"""The TTT rollout of an EAGLE3 head over one shard of packed rows.

At step k index i takes token i+1+k and the layers' own output of step k-1; a layer's query sees step 0's keys
of its document up to i and its own keys of steps 1..k. Source: EAGLE-3 (arXiv 2503.01840), section 3.

Queries and MLP run on the live indices of train/targets.py, which are in their places where they are all
positions; keys and values of step 0 on all positions. The embedding's half of the q, k, v projections depends
on the token alone: it is computed once for all steps. Several layers are so many scanned steps for each step,
which see the keys of their own layer alone.

Of rows in pieces (train/pieces.py) a chip computes its own positions and, for nothing, the few of the halo;
step 0's keys and values are those of whole rows of some heads.

Dimensions: B rows, T positions, n = B * T, C live indices, K steps, L layers, H hidden, N query heads, J
key/value heads, d head_dim, R = d / 2, X = (N + 2J) d.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.attention import KEPT, attend
from common.layers import linear, rms_norm
from train import pieces
from train.batch import Batch, Frozen, Params, by_steps, embeddings
from train.heads.eagle3.block import (
    MATMULS,
    Layer,
    Turns,
    block,
    fused,
    keys_values,
    of_layer,
    turns,
    weights,
)
from train.heads.eagle3.own_keys import KeysValues, join
from train.heads.eagle3.sizes import Sizes
from train.heads.ttt import Step, rolled
from train.targets import ahead, permute, slots

_MATMULS = 10 * 2**30  # bytes of a chip for results of matmuls: a third of a v6e's


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["live", "slot", "turns_KBmR", "positions_BT", "segments_BT"],
    meta_fields=["own"],
)
@dataclass(frozen=True)
class _Places:
    """Where positions and live indices are."""

    live: jax.Array | None  # int32 [C]; None where they are all positions
    slot: jax.Array | None  # int32 [K + n], the inverse, behind K places that are free
    turns_KBmR: Turns  # of the live indices at every step
    positions_BT: jax.Array
    segments_BT: jax.Array  # of whole rows
    own: int  # how many of a row's T positions are not of the halo


class _Shared(NamedTuple):
    """What all steps read. The embedding's halves, and step 0's keys and values, are of all positions."""

    layers: Params
    norm: jax.Array
    queries_nY: jax.Array
    keys_values_nY: jax.Array
    first: KeysValues


def rollout(
    c: Sizes, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
) -> list[jax.Array]:
    """The final-normed states [K, C, H], in `dtype`, of every live index, for each of `by_steps`."""
    n = batch.tokens.size
    outside, layers = weights(c, params, dtype)
    embedded = embeddings(frozen, batch).astype(dtype)
    token_nH, q = rms_norm(embedded, outside["token_norm"], c.rms_eps), c.num_heads * c.head_dim
    queries, keys = (linear(token_nH, w) for w in (outside["qkv"][:q], outside["qkv"][q:]))
    aux = batch.aux_hidden.astype(dtype)
    state = fused(c, outside, aux.reshape(-1, *aux.shape[2:])).reshape(*aux.shape[:2], -1)
    state_nH = pieces.widened(state, batch.tokens.shape[1]).reshape(n, -1)
    parts = by_steps(batch, steps)
    places = [_places(c, part, which.stop) for which, part in parts]
    first = _first_keys(c, layers, places[0], (queries, keys), state_nH)
    shared = _Shared(layers, outside["norm"], queries, keys, first)
    kept = _kept(c, sum(len(which) * len(part.live) for which, part in parts), dtype)
    ttt = Step(partial(_make, c), partial(_advance, c), kept)
    found = []
    for (which, _), at in zip(parts, places, strict=True):
        scanned = range(which.start * c.layers, which.stop * c.layers)
        states = rolled(ttt, scanned, at, shared, _of_live(at, state_nH))
        state_nH = _everywhere(at, states[-1])
        found.append(states[c.layers - 1 :: c.layers])
    return found if c.norm_output else [rms_norm(x, outside["norm"], c.rms_eps) for x in found]


def _kept(c: Sizes, indices: int, dtype: Any) -> tuple[str, ...]:
    """What is kept for the backward pass, where all steps have so many indices: of many, and in float32 on
    CPUs, memory is scarcer than matmuls, which are done again."""
    width = 2 * c.ffn + c.num_heads * c.head_dim + c.hidden_size
    size = c.layers * indices * width * jnp.dtype(dtype).itemsize
    return (KEPT,) if dtype == jnp.float32 or size > _MATMULS else (KEPT, MATMULS)


def _places(c: Sizes, batch: Batch, steps: int) -> _Places:
    C, n = len(batch.live), batch.tokens.size
    positions_BT, step_K11 = batch.positions, jnp.arange(steps, dtype=jnp.int32)[:, None, None]
    segments_BT, own = batch.segment_ids, batch.aux_hidden.shape[1]
    if own < positions_BT.shape[1]:
        segments_BT = pieces.whole_rows(segments_BT[:, :own])
    rows = positions_BT, segments_BT, own
    if n == C:
        return _Places(None, None, turns(c, positions_BT[None] + step_K11), *rows)
    turned = turns(c, positions_BT.reshape(-1).at[batch.live].get(mode="clip")[None, None] + step_K11)
    slot = jnp.concatenate([jnp.full((steps,), C, jnp.int32), slots(batch.live, n)])
    return _Places(batch.live, slot, turned, *rows)


def _of_live(at: _Places, x_n: jax.Array) -> jax.Array:
    """[n, ...] -> [C, ...]"""
    return x_n if at.live is None else permute(x_n, at.live, at.slot[-len(x_n) :])


def _everywhere(at: _Places, x_C: jax.Array) -> jax.Array:
    """[C, ...] -> [n, ...], zeros where an index is not live."""
    return x_C if at.live is None else permute(x_C, at.slot[-at.positions_BT.size :], at.live)


def _first_keys(
    c: Sizes, layers: Params, at: _Places, tokens: tuple[jax.Array, jax.Array], state_nH: jax.Array
) -> KeysValues:
    """Step 0's keys and values of all positions; of several layers stacked, for which all but the last one
    run on all positions."""
    queries, keys = (_ahead_by(ahead(jnp.int32(0)), x) for x in tokens)
    turned, found = turns(c, at.positions_BT), []
    for number in range(c.layers):
        if number == 1:
            queries, keys = (jnp.zeros_like(x) for x in (queries, keys))
        w = of_layer(c, layers, number)
        made = _of_rows(c, at, keys_values(c, w, keys, state_nH, turned))
        found.append(made)
        if number + 1 < c.layers:
            read = partial(_seen, c, at, made)
            state_nH = block(c, w, queries, state_nH, turned, read, number)
    return found[0] if c.layers == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *found)


def _of_rows(c: Sizes, at: _Places, made: KeysValues) -> KeysValues:
    """Keys and values of whole rows, of some heads where a chip has pieces of them."""
    if at.own == at.positions_BT.shape[1]:
        return made

    def whole(x: jax.Array) -> jax.Array:
        own = x.reshape(*at.positions_BT.shape, -1, c.head_dim)[:, : at.own]
        return pieces.by_heads(own).reshape(at.segments_BT.size, -1)

    return whole(made[0]), whole(made[1])


def _which(c: Sizes, i: jax.Array) -> tuple[jax.Array, Layer]:
    """(step, layer) of the scan's step i."""
    return (i, 0) if c.layers == 1 else (i // c.layers, i % c.layers)


@jax.custom_vjp
def _ahead_by(by: jax.Array, x_n: jax.Array) -> jax.Array:
    """x[i + by] at i; behind the last, where nothing counts, the first. Its gradient is moved back."""
    return jnp.roll(x_n, -by, 0)


_ahead_by.defvjp(lambda by, x_n: (_ahead_by(by, x_n), by), lambda by, g_n: (None, jnp.roll(g_n, by, 0)))


def _token(c: Sizes, at: _Places, k: jax.Array, layer: Layer, x_nY: jax.Array) -> jax.Array:
    """[C, Y] of the tokens that the live indices take at step k."""
    by, n = ahead(k), len(x_nY)
    if at.live is None:
        half = _ahead_by(by, x_nY)
    else:  # the index that reads a position is `by` before it
        inverse = jax.lax.dynamic_slice_in_dim(at.slot, len(at.slot) - n - by, n)
        half = permute(x_nY, at.live + by, inverse)
    return half if c.layers == 1 else jnp.where(layer == 0, half, jnp.zeros_like(half))


def _turns(at: _Places, k: jax.Array) -> Turns:
    cos_KBmR, sin_KBmR = at.turns_KBmR
    return cos_KBmR[k], sin_KBmR[k]


def _make(c: Sizes, at: _Places, i: jax.Array, shared: _Shared, state_CH: jax.Array) -> KeysValues:
    k, layer = _which(c, i)
    half = _token(c, at, k, layer, shared.keys_values_nY)
    return keys_values(c, of_layer(c, shared.layers, layer), half, state_CH, _turns(at, k))


def _advance(
    c: Sizes, at: _Places, i: jax.Array, shared: _Shared, state_CH: jax.Array, own: KeysValues
) -> jax.Array:
    k, layer = _which(c, i)
    half = _token(c, at, k, layer, shared.queries_nY)
    if c.layers > 1:  # [K * L, C, J d], of which this layer's are seen
        own = jax.tree.map(lambda x: x.reshape(-1, c.layers, *x.shape[1:])[:, layer], own)
    read = partial(_read, c, at, k, of_layer(c, shared.first, layer), own)
    state = block(c, of_layer(c, shared.layers, layer), half, state_CH, _turns(at, k), read, layer)
    if not c.norm_output:
        return state
    return jnp.where(layer == c.layers - 1, rms_norm(state, shared.norm, c.rms_eps), state)


def _read(
    c: Sizes, at: _Places, k: jax.Array, first: KeysValues, own: KeysValues, q_BmNd: jax.Array
) -> jax.Array:
    """What the live indices' queries read [C, N * d] of step 0's keys of all positions and of their own ones
    of steps 1..k."""
    (B, T), scale = at.positions_BT.shape, c.head_dim**-0.5
    if at.live is None:
        return join(scale, *_attended(c, at, first, q_BmNd), q_BmNd, own, k)
    q_BTNd = _everywhere(at, q_BmNd[0]).reshape(B, T, *q_BmNd.shape[2:])
    read = (_of_live(at, x.reshape(B * T, *x.shape[2:]))[None] for x in _attended(c, at, first, q_BTNd))
    return join(scale, *read, q_BmNd, own, k)


def _seen(c: Sizes, at: _Places, first: KeysValues, q_BTNd: jax.Array) -> jax.Array:
    """What queries of all positions read of step 0's keys, [n, N * d]."""
    return _attended(c, at, first, q_BTNd)[0].reshape(at.positions_BT.size, -1)


def _attended(c: Sizes, at: _Places, first: KeysValues, q_BTNd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what queries of all positions read of step 0's keys [B, T, N, d], logsumexp [B, T, N] of their
    logits)."""
    (_, T), scale = at.positions_BT.shape, c.head_dim**-0.5
    k, v = (x.reshape(*at.segments_BT.shape, -1, c.head_dim) for x in first)
    if at.own == T:
        return attend(q_BTNd, k, v, at.segments_BT, scale, return_lse=True)
    q = pieces.by_heads(q_BTNd[:, : at.own])
    found = attend(q, k, v, at.segments_BT, scale, return_lse=True)
    read, lse = (pieces.widened(pieces.by_positions(x), T) for x in found)
    return read, lse
