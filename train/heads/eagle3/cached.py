"""An EAGLE3 head that drafts token by token, its layers' keys and values in a cache (train/heads/cached.py).

The first step at an index takes the target's aux states, as step 0 of the rollout; later ones take the state
that the step before left, each at the next position.

Dimensions: B sequences, m indices of each, H hidden size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from common.cached_attention import New
from common.layers import linear, rms_norm
from train.batch import Params
from train.heads.cached import Cache, read, written
from train.heads.eagle3.block import block, keys_values, of_layer, turns
from train.heads.eagle3.sizes import Sizes


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
        cache = written(cache, number, new, keys_values(c, w, keys, state, turned))
        seen = partial(read, cache, number, new)
        state = block(c, w, queries, state, turned, seen, number)
        queries, keys = jnp.zeros_like(queries), jnp.zeros_like(keys)
    hidden = rms_norm(state, outside["norm"], c.rms_eps)
    left = hidden if c.norm_output else state
    return left.reshape(B, m, H), hidden.reshape(B, m, H), cache
