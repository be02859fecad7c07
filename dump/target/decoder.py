"""The frozen target as pure functions: tokens in, aux states and last hidden state out.

h_k is the residual stream that enters layer k (before any norm); `last` is taken after the final norm, so
logits = lm_head @ last. Inside a mesh every chip runs the same program on its own heads, feed-forward
columns and experts (Megatron, arXiv 1909.08053), and sums after each part.

Dimensions: B rows, T positions, A aux states, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.errors import EyasError
from common.fsdp import gathered
from common.layers import einsum, rms_norm
from common.mesh import sharding, spec, ways
from dump.target.groups import Group, group
from dump.target.quant import dequantised
from dump.target.spec import Context, Layer, TargetConfig
from dump.target.weights import parameters

_NOWHERE = -1  # the slot of a state that nobody wants


def check_aux_layers(cfg: TargetConfig, aux_layers: tuple[int, ...]) -> None:
    """EyasError unless the aux layers are ascending numbers of 0..num_layers."""
    within = all(0 <= k <= cfg.num_layers for k in aux_layers)
    if not aux_layers or not within or list(aux_layers) != sorted(set(aux_layers)):
        raise EyasError(f"aux_layers={list(aux_layers)} must be ascending numbers of 0 to {cfg.num_layers}")


def check_length(cfg: TargetConfig, length: int) -> None:
    """EyasError if rows of `length` tokens would not be computed exactly."""
    if cfg.max_length is not None and length > cfg.max_length:
        raise EyasError(
            f"rows of {length} tokens: {cfg.max_length_reason}; use --length {cfg.max_length} or less"
        )


def forward(
    cfg: TargetConfig,
    weights: dict[str, jax.Array],
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    aux_layers: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """(aux [B, T, A, H], last hidden [B, T, H]) in the weights' dtype; pure, to be jitted by the caller.

    A document (segment) of a packed row gives what it gives alone. With weights on a mesh, the rows may
    lie anywhere on it; the results are split by "batch".
    """
    check_aux_layers(cfg, aux_layers)
    check_length(cfg, tokens_BT.shape[1])
    mesh = jax.typeof(weights["norm"]).sharding.mesh
    if mesh.empty:
        whole = dict.fromkeys(weights, ())
        return _local(cfg, aux_layers, None, whole, weights, tokens_BT, segment_ids_BT, positions_BT)
    rows = sharding(mesh, ("batch", None))
    arrays = (jax.sharding.reshard(jnp.asarray(x), rows) for x in (tokens_BT, segment_ids_BT, positions_BT))
    return _on_mesh(cfg, aux_layers, mesh)(weights, *arrays)


def _on_mesh(cfg: TargetConfig, aux_layers: tuple[int, ...], mesh: Mesh):
    """`_local` on every chip of a mesh."""
    rows = spec(("batch", None))
    tp = ways(mesh, "heads")
    axes = {name: p.axes for name, p in parameters(cfg, tp, ways(mesh, "fsdp")).items()}
    held = {name: spec(found) for name, found in axes.items()}
    return jax.shard_map(
        partial(_local, cfg, aux_layers, tp if tp > 1 else None, axes),
        mesh=mesh,
        in_specs=(held, rows, rows, rows),
        out_specs=(spec(("batch", None, None, None)), spec(("batch", None, None))),
        check_vma=False,  # attention's kernel does not say over which axes its results vary
    )


def _local(cfg, aux_layers, tp, axes, weights, tokens_BT, segment_ids_BT, positions_BT):
    """The forward pass of one chip's rows and of its share of the weights."""
    context = Context(segment_ids_BT, positions_BT, tp)
    return run_layers(cfg, aux_layers, axes, weights, tokens_BT, context, {})[:2]


def run_layers(
    cfg: TargetConfig,
    aux_layers: tuple[int, ...],
    axes: dict[str, tuple[str | None, ...]],
    weights: dict[str, jax.Array],
    tokens_BT: jax.Array,
    context: Context,
    cache: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """(aux [B, T, A, H], last hidden [B, T, H], the cache as the layers leave it; see remembering.py)."""
    embed = gathered({"embed_tokens": weights["embed_tokens"]}, axes)["embed_tokens"]
    h_BTH = _embed(cfg, embed, tokens_BT, context)
    slots = [aux_layers.index(k) if k in aux_layers else _NOWHERE for k in range(cfg.num_layers + 1)]
    kept = jnp.zeros((len(aux_layers), *h_BTH.shape), h_BTH.dtype)
    for number, found in enumerate(group(cfg.layers)):
        own = _under(f"{number}.", cache)
        h_BTH, kept, own = _run_group(number, found, axes, weights, h_BTH, kept, own, slots, context)
        cache = cache | {f"{number}.{name}": x for name, x in own.items()}
    if slots[-1] != _NOWHERE:
        kept = kept.at[slots[-1]].set(h_BTH)
    last_BTH = rms_norm(h_BTH, weights["norm"], cfg.norm.eps, cfg.norm.offset)
    return jnp.moveaxis(kept, 0, 2), last_BTH, cache


def _embed(cfg: TargetConfig, embed_VH: jax.Array, tokens_BT: jax.Array, context: Context) -> jax.Array:
    """The tokens' embeddings; each chip looks up its own part of the vocabulary."""
    if not context.splits(cfg.vocab_size):
        h_BTH = embed_VH[tokens_BT]
    else:
        own = tokens_BT - context.chip() * embed_VH.shape[0]
        inside = (own >= 0) & (own < embed_VH.shape[0])
        found = embed_VH[jnp.where(inside, own, 0)]
        h_BTH = context.total(jnp.where(inside[..., None], found, jnp.zeros((), found.dtype)))
    return h_BTH if cfg.embed_scale == 1.0 else h_BTH * jnp.asarray(cfg.embed_scale, h_BTH.dtype)


def _keep(kept: jax.Array, h_BTH: jax.Array, slot: jax.Array) -> jax.Array:
    """The states with h in its slot, if it has one.

    What is not wanted is not written: a loop of no steps, where a `cond` would copy all states every time.
    """
    if not len(kept):
        return kept
    rows = jnp.where(slot == _NOWHERE, 0, h_BTH.shape[0])
    return jax.lax.fori_loop(0, rows, lambda row, kept: kept.at[slot, row].set(h_BTH[row]), kept)


def _under(prefix: str, named: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def _run_group(
    number: int, found: Group, axes, weights, h_BTH, kept, cache, slots: list[int], context: Context
):
    """All layers of a group, scanned over its repeats."""
    size = len(found.period)
    places = range(size)
    stacked = [_under(f"{number}.{p}.", weights) for p in places]
    axes_P = [{name: a[1:] for name, a in _under(f"{number}.{p}.", axes).items()} for p in places]
    own = slots[found.first : found.first + size * found.repeats]
    for layer in found.period:  # tables are made outside of the scan
        if rope := getattr(layer.attention, "rope", None):
            context.tables(rope)

    def body(carry, xs):
        h, kept, cache = carry
        w, slots_P, context.repeat = xs
        for p in places:
            kept = _keep(kept, h, slots_P[p])
            context.cache = _under(f"{p}.", cache)
            h = _run_layer(found.period[p], gathered(w[p], axes_P[p]), h, context)
            cache = cache | {f"{p}.{name}": x for name, x in context.cache.items()}
        return (h, kept, cache), None

    slots_RP = jnp.asarray(own, jnp.int32).reshape(found.repeats, size)
    repeats = jnp.arange(found.repeats, dtype=jnp.int32) if cache else None
    carry, _ = jax.lax.scan(body, (h_BTH, kept, cache), (stacked, slots_RP, repeats))
    return carry


def _run_layer(layer: Layer, w: dict[str, jax.Array], h_BTH: jax.Array, context: Context) -> jax.Array:
    # Those that became plain at load have no scale any more.
    held = tuple((name, scheme) for name, scheme in layer.quantised if f"{name}.scale" in w)
    if held:
        w = dequantised(held, layer.plain_weights(context.tp or 1), w, h_BTH.dtype, context)

    def norm(name: str, x: jax.Array) -> jax.Array:
        return rms_norm(x, w[name], layer.norm.eps, layer.norm.offset)

    if layer.sandwich:
        y = layer.attention(w, norm("input_layernorm", h_BTH), context)
        h_BTH = h_BTH + norm("post_attention_layernorm", y)
        y = layer.feed_forward(w, norm("pre_feedforward_layernorm", h_BTH), context)
        return h_BTH + norm("post_feedforward_layernorm", y)
    h_BTH = h_BTH + layer.attention(w, norm("input_layernorm", h_BTH), context)
    return h_BTH + layer.feed_forward(w, norm("post_attention_layernorm", h_BTH), context)


def output_head(cfg: TargetConfig, weights: dict[str, jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The function from last hidden states [..., H] to float32 logits [..., V], its matrix gathered once.

    With tp > 1 its results are split by "vocab".
    """
    head_VH = weights["embed_tokens" if cfg.tied else "lm_head"]
    mesh = jax.typeof(head_VH).sharding.mesh
    if not mesh.empty:
        # Not "vocab" where the mesh does not split it: one chip's part is then not typed as a part.
        tp = ways(mesh, "vocab")
        split = "vocab" if tp > 1 and cfg.vocab_size % tp == 0 else None
        head_VH = jax.sharding.reshard(head_VH, sharding(mesh, (split, None)))
    return lambda last: einsum("...h,vh->...v", last, head_VH)


def logits(cfg: TargetConfig, weights: dict[str, jax.Array], last: jax.Array) -> jax.Array:
    """float32 logits [..., V] of last hidden states [..., H]."""
    return output_head(cfg, weights)(last)
