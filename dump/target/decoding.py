"""Sequences that grow: the layers of the forward pass, with a cache of what came before.

`prefill` begins sequences, `step` continues them by a few tokens each, at positions of their own. Both are
pure, of static shapes, and to be jitted by the caller with the cache donated. Whoever drafts gives a step the
drafts as well and starts the next one behind those that were accepted.

Dimensions: B sequences of the cache, S positions, b of them that begin, T and m tokens, A aux states.
"""

from typing import Any

import jax
import jax.numpy as jnp

from common.errors import EyasError
from dump.target.decoder import check_aux_layers, check_length, run_layers
from dump.target.groups import group
from dump.target.remembering import Remembering
from dump.target.spec import TargetConfig

Cache = dict[str, jax.Array]
Found = tuple[jax.Array, jax.Array, Cache]  # aux states, last hidden states, cache


def cache_shapes(
    cfg: TargetConfig, sequences: int, length: int, dtype: Any, tokens: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """What a cache of `sequences` of up to `length` tokens is made of; `tokens`: the most of a step.

    EyasError if sequences of that length would not be computed exactly.
    """
    check_length(cfg, length)
    return {
        f"{number}.{place}.{name}": jax.ShapeDtypeStruct((found.repeats, sequences, *shape), own or dtype)
        for number, found in enumerate(group(cfg.layers))
        for place, layer in enumerate(found.period)
        for name, (shape, own) in layer.attention.remembers(length, tokens).items()
    }


def empty_cache(cfg: TargetConfig, sequences: int, length: int, dtype: Any, tokens: int = 1) -> Cache:
    """A cache that holds nothing yet."""
    shapes = cache_shapes(cfg, sequences, length, dtype, tokens)
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}


def prefill(
    cfg: TargetConfig,
    weights: dict[str, jax.Array],
    cache: Cache,
    tokens_bT: jax.Array,
    lengths_b: jax.Array,
    slots_b: jax.Array,
    aux_layers: tuple[int, ...] = (),
) -> Found:
    """(aux [b, T, A, H], last [b, T, H], cache) of sequences that begin in these slots of the cache.

    The first `lengths` tokens of each are its own; what is found for the others means nothing. What the slots
    held is forgotten.
    """
    context = Remembering(tokens_bT, jnp.zeros_like(lengths_b), lengths_b, slots_b)
    return _pass(cfg, weights, cache, tokens_bT, context, aux_layers)


def step(
    cfg: TargetConfig,
    weights: dict[str, jax.Array],
    cache: Cache,
    tokens_Bm: jax.Array,
    starts_B: jax.Array,
    aux_layers: tuple[int, ...] = (),
) -> Found:
    """(aux [B, m, A, H], last [B, m, H], cache) of the next tokens of all sequences, from positions `starts`
    on.

    A start is at most where the last pass over a sequence ended and at least where that one started: tokens
    of it that stand there or behind are forgotten.
    """
    return _pass(cfg, weights, cache, tokens_Bm, Remembering(tokens_Bm, starts_B), aux_layers)


def _pass(cfg, weights, cache, tokens_BT, context: Remembering, aux_layers: tuple[int, ...]) -> Found:
    if aux_layers:
        check_aux_layers(cfg, aux_layers)
    if not jax.typeof(weights["norm"]).sharding.mesh.empty:
        raise EyasError("a target that lies on a mesh cannot decode; put its weights on one device")
    axes = dict.fromkeys(weights, ())
    return run_layers(cfg, aux_layers, axes, weights, tokens_BT, context, cache)
