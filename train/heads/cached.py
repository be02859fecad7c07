"""Keys and values of a head's layers in a cache, for heads that draft token by token.

What a step writes, later ones see: as step 0's keys lie at their own positions and those of step k at i + k,
a cache in the order of positions holds what a rollout sees (train/heads/live.py).

Dimensions: B sequences, m indices of each, S places of the cache, L layers, N query and J key/value heads, d
head_dim.
"""

import jax
import jax.numpy as jnp

from common.cached_attention import New, attend_to_cache
from train.heads.own_keys import KeysValues

Cache = dict[str, jax.Array]


def empty(layers: int, sequences: int, length: int, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> Cache:
    """Keys and values [L, B, S, J, d] of nothing yet."""
    return {name: jnp.zeros((layers, sequences, length, kv_heads, head_dim), dtype) for name in ("k", "v")}


def written(cache: Cache, layer: int, new: New, keys_values: KeysValues) -> Cache:
    """The cache with a layer's keys and values [B * m, J * d] in place; behind its end they are lost."""
    rows_B1 = jnp.arange(len(new.places_Bm), dtype=jnp.int32)[:, None]
    for name, x in zip("kv", keys_values, strict=True):
        place = cache[name].at[layer, rows_B1, new.places_Bm]
        x_BmJd = x.reshape(*new.places_Bm.shape, *cache[name].shape[-2:])
        cache = cache | {name: place.set(x_BmJd, mode="drop")}
    return cache


def read(cache: Cache, layer: int, new: New, q_BmNd: jax.Array) -> jax.Array:
    """What queries read of a layer's places, [B * m, N * d]."""

    def block_of(start: jax.Array, size: int) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.dynamic_slice_in_dim(cache[name][layer], start, size, 1) for name in "kv")

    found = attend_to_cache(q_BmNd, block_of, cache["k"].shape[2], new, q_BmNd.shape[-1] ** -0.5)
    return found.reshape(new.places_Bm.size, -1)
