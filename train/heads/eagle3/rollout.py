"""The TTT rollout of an EAGLE3 head over one shard of packed rows.

At step k index i takes token i+1+k and the layers' own output of step k-1; a layer's query sees step 0's keys
of its document up to i and its own keys of steps 1..k. Source: EAGLE-3 (arXiv 2503.01840), section 3.

Which of it runs on live indices alone, and on what of rows in pieces: train/heads/live.py. The embedding's
half of the q, k, v projections depends on the token alone: it is computed once for all steps. Several layers
are so many scanned steps for each step, which see the keys of their own layer alone.

Dimensions: B rows, T positions, n = B * T, C live indices, K steps, L layers, H hidden, N query heads, J
key/value heads, d head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.attention import KEPT
from common.layers import linear, rms_norm
from train import pieces
from train.batch import Batch, Frozen, Params, by_steps, embeddings
from train.heads import live
from train.heads.eagle3.block import MATMULS, Layer, block, fused, keys_values, of_layer, turns, weights
from train.heads.eagle3.sizes import Sizes
from train.heads.live import Places
from train.heads.own_keys import KeysValues
from train.heads.ttt import Step, rolled
from train.targets import ahead

_MATMULS = 10 * 2**30  # bytes of a chip for results of matmuls: a third of a v6e's


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
    places = [live.places(part, which.stop, partial(turns, c)) for which, part in parts]
    first = _first_keys(c, layers, places[0], (queries, keys), state_nH)
    shared = _Shared(layers, outside["norm"], queries, keys, first)
    kept = _kept(c, sum(len(which) * len(part.live) for which, part in parts), dtype)
    ttt = Step(partial(_make, c), partial(_advance, c), kept)
    found = []
    for (which, _), at in zip(parts, places, strict=True):
        scanned = range(which.start * c.layers, which.stop * c.layers)
        states = rolled(ttt, scanned, at, shared, live.of_live(at, state_nH))
        state_nH = live.everywhere(at, states[-1])
        found.append(states[c.layers - 1 :: c.layers])
    return found if c.norm_output else [rms_norm(x, outside["norm"], c.rms_eps) for x in found]


def _kept(c: Sizes, indices: int, dtype: Any) -> tuple[str, ...]:
    """What is kept for the backward pass, where all steps have so many indices: of many, and in float32 on
    CPUs, memory is scarcer than matmuls, which are done again."""
    width = 2 * c.ffn + c.num_heads * c.head_dim + c.hidden_size
    size = c.layers * indices * width * jnp.dtype(dtype).itemsize
    return (KEPT,) if dtype == jnp.float32 or size > _MATMULS else (KEPT, MATMULS)


def _first_keys(
    c: Sizes, layers: Params, at: Places, tokens: tuple[jax.Array, jax.Array], state_nH: jax.Array
) -> KeysValues:
    """Step 0's keys and values of all positions; of several layers stacked, for which all but the last one
    run on all positions."""
    queries, keys = (live.ahead_by(ahead(jnp.int32(0)), x) for x in tokens)
    turned, found = turns(c, at.positions_BT), []
    for number in range(c.layers):
        if number == 1:
            queries, keys = (jnp.zeros_like(x) for x in (queries, keys))
        w = of_layer(c, layers, number)
        made = live.first_keys(at, keys_values(c, w, keys, state_nH, turned), c.head_dim)
        found.append(made)
        if number + 1 < c.layers:
            read = partial(live.read_first, at, made)
            state_nH = block(c, w, queries, state_nH, turned, read, number)
    return found[0] if c.layers == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *found)


def _which(c: Sizes, i: jax.Array) -> tuple[jax.Array, Layer]:
    """(step, layer) of the scan's step i."""
    return (i, 0) if c.layers == 1 else (i // c.layers, i % c.layers)


def _token(c: Sizes, at: Places, k: jax.Array, layer: Layer, x_nY: jax.Array) -> jax.Array:
    """[C, Y] of the tokens that the live indices take at step k, which the first layer alone reads."""
    half = live.of_tokens(at, k, x_nY)
    return half if c.layers == 1 else jnp.where(layer == 0, half, jnp.zeros_like(half))


def _make(c: Sizes, at: Places, i: jax.Array, shared: _Shared, state_CH: jax.Array) -> KeysValues:
    k, layer = _which(c, i)
    half = _token(c, at, k, layer, shared.keys_values_nY)
    return keys_values(c, of_layer(c, shared.layers, layer), half, state_CH, at.turns_at(k))


def _advance(
    c: Sizes, at: Places, i: jax.Array, shared: _Shared, state_CH: jax.Array, own: KeysValues
) -> jax.Array:
    k, layer = _which(c, i)
    half = _token(c, at, k, layer, shared.queries_nY)
    if c.layers > 1:  # [K * L, C, J d], of which this layer's are seen
        own = jax.tree.map(lambda x: x.reshape(-1, c.layers, *x.shape[1:])[:, layer], own)
    read = partial(live.read, at, k, of_layer(c, shared.first, layer), own)
    state = block(c, of_layer(c, shared.layers, layer), half, state_CH, at.turns_at(k), read, layer)
    if not c.norm_output:
        return state
    return jnp.where(layer == c.layers - 1, rms_norm(state, shared.norm, c.rms_eps), state)
