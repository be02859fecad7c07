"""Sequences that grow: the layers of the forward pass, with a cache of what came before.

`prefill` begins sequences, `step` continues them by a few tokens each, at positions of their own. Both are
pure, of static shapes, and to be jitted by the caller with the cache donated. Whoever drafts gives a step the
drafts as well and starts the next one behind those that were accepted; of a tree, `keep` moves them together.

Dimensions: B sequences of the cache, S places, b of them that begin, T and m tokens, A aux states.
"""

from typing import Any

import jax
import jax.numpy as jnp

from common.cached_attention import Tree
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
    tree: Tree | None = None,
) -> Found:
    """(aux [B, m, A, H], last [B, m, H], cache) of the next tokens of all sequences, from positions `starts`
    on; of a tree that begins there, whose m tokens take as many places of the cache.

    A start is at most where the last pass over a sequence ended and at least where that one started: tokens
    of it that stand there or behind are forgotten.
    """
    return _pass(cfg, weights, cache, tokens_Bm, Remembering(tokens_Bm, starts_B, tree=tree), aux_layers)


def require_trees(cfg: TargetConfig) -> None:
    """EyasError for a target whose layers keep a state, which goes along one sequence."""
    if any(getattr(layer.attention, "recurrent", False) for layer in cfg.layers):
        raise EyasError(
            f"{cfg.architecture} has layers that keep a state, of which a tree would need one a branch; "
            "draft a chain (--eagle-topk 1)"
        )


def keep(cache: Cache, starts_B: jax.Array, nodes_Bd: jax.Array) -> Cache:
    """The cache behind a step over a tree of drafts: these of its nodes, ascending, stand in a row."""
    rows_B1, count = jnp.arange(len(starts_B), dtype=jnp.int32)[:, None], nodes_Bd.shape[1]
    to_Bd = starts_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]

    def moved(x_RBS: jax.Array) -> jax.Array:
        found = x_RBS[:, rows_B1, starts_B[:, None] + nodes_Bd]
        return x_RBS.at[:, rows_B1, to_Bd].set(found, mode="drop")

    return jax.tree.map(moved, cache)


def _pass(cfg, weights, cache, tokens_BT, context: Remembering, aux_layers: tuple[int, ...]) -> Found:
    if aux_layers:
        check_aux_layers(cfg, aux_layers)
    if not jax.typeof(weights["norm"]).sharding.mesh.empty:
        raise EyasError("a target that lies on a mesh cannot decode; put its weights on one device")
    axes = dict.fromkeys(weights, ())
    return run_layers(cfg, aux_layers, axes, weights, tokens_BT, context, cache)
