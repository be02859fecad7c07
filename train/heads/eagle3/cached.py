"""An EAGLE3 head that drafts token by token, its layers' keys and values in a cache.

The first step at an index takes the target's aux states, as step 0 of the rollout; later ones take the state
that the step before left, each at the next position. What a step writes, later ones see: as step 0's keys lie
at their own positions and those of step k at i + k, a cache in the order of positions holds what TTT sees.

Dimensions: B sequences, m indices of each, S places of the cache, H hidden size, L layers, N query and J
key/value heads, d head_dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.cached_attention import New, attend_to_cache
from common.layers import linear, rms_norm
from train.batch import Params
from train.heads.eagle3.block import block, keys_values, of_layer, turns
from train.heads.eagle3.own_keys import KeysValues
from train.heads.eagle3.sizes import Sizes

Cache = dict[str, jax.Array]


def empty_cache(c: Sizes, sequences: int, length: int, dtype: Any) -> Cache:
    """Keys and values [L, B, S, J, d] of nothing yet."""
    shape = (c.layers, sequences, length, c.num_kv_heads, c.head_dim)
    return {name: jnp.zeros(shape, dtype) for name in ("k", "v")}


def step(
    c: Sizes,
    ready: tuple[Params, Params],
    cache: Cache,
    embedded_BmH: jax.Array,
    state_BmH: jax.Array,
    new: New,
) -> tuple[jax.Array, jax.Array, Cache]:
    """(the state that the next step takes, the one that gives logits, both [B, m, H], cache)."""
    outside, layers = ready
    (B, m, H), q = state_BmH.shape, c.num_heads * c.head_dim
    token = rms_norm(embedded_BmH.reshape(-1, H), outside["token_norm"], c.rms_eps)
    queries, keys = (linear(token, w) for w in (outside["qkv"][:q], outside["qkv"][q:]))
    turned, state = turns(c, new.positions_Bm), state_BmH.reshape(-1, H)
    for number in range(c.layers):
        w = of_layer(c, layers, number)
        cache = _written(c, cache, number, new, keys_values(c, w, keys, state, turned))
        read = partial(_read, c, cache, number, new)
        state = block(c, w, queries, state, turned, read, number)
        queries, keys = jnp.zeros_like(queries), jnp.zeros_like(keys)
    hidden = rms_norm(state, outside["norm"], c.rms_eps)
    left = hidden if c.norm_output else state
    return left.reshape(B, m, H), hidden.reshape(B, m, H), cache


def _written(c: Sizes, cache: Cache, layer: int, new: New, keys_values: KeysValues) -> Cache:
    """The cache with a layer's keys and values [B * m, J * d] in place; behind its end they are lost."""
    rows_B1 = jnp.arange(len(new.places_Bm), dtype=jnp.int32)[:, None]
    for name, x in zip("kv", keys_values, strict=True):
        place = cache[name].at[layer, rows_B1, new.places_Bm]
        x_BmJd = x.reshape(*new.places_Bm.shape, -1, c.head_dim)
        cache = cache | {name: place.set(x_BmJd, mode="drop")}
    return cache


def _read(c: Sizes, cache: Cache, layer: int, new: New, q_BmNd: jax.Array) -> jax.Array:
    """What queries read of the cache, [B * m, N * d]."""

    def block_of(start: jax.Array, size: int) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.dynamic_slice_in_dim(cache[name][layer], start, size, 1) for name in "kv")

    read = attend_to_cache(q_BmNd, block_of, cache["k"].shape[2], new, c.head_dim**-0.5)
    return read.reshape(new.places_Bm.size, -1)
