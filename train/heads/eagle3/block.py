"""The layers of an EAGLE3 head, each a function of its inputs alone.

The first layer takes the normed embedding and the normed state beside each other; later ones are plain Llama
layers. Written as one: what enters a layer is a state, and the embedding's half of its q, k, v, which is 0
behind the first.

Dimensions: B rows of m indices, one after another where there is no B; H hidden size, N query heads, J
key/value heads, d head_dim, R = d / 2, X = (N + 2J) d, L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common.layers import apply_rope, linear, rms_norm, rope_tables
from common.rope import inverse_frequencies
from train.batch import Params
from train.heads.eagle3.sizes import Sizes, layer_name
from train.heads.own_keys import KeysValues

Layer = jax.Array | int  # which of them
Turns = tuple[jax.Array, jax.Array]  # cos and sin [B, m, R], float32
MATMULS = "matmuls"  # names their results, for a jax.checkpoint around a block
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LAYER = ("self_attn.o_proj", "post_attention_layernorm", *_MLP)


def weights(c: Sizes, params: Params, dtype: Any) -> tuple[Params, Params]:
    """(what is outside of the layers, the layers): matrices in `dtype`, norms as they are.

    A layer's q, k, v projections are one matrix [X, H] of the state; the first layer's other half is that of
    the embedding. Several layers are stacked, [L, ...].
    """
    w = {name.removesuffix(".weight"): x.astype(dtype) if x.ndim > 1 else x for name, x in params.items()}
    outside = {"fc": w["fc"], "token_norm": w["midlayer.input_layernorm"], "norm": w["norm"]}
    if c.fc_norm:
        outside["fc_norm"] = jnp.stack([w[f"fc_norm.{number}"] for number in range(len(c.aux_layers))])
    layers = []
    for number in range(c.layers):
        name = layer_name(number)
        qkv = jnp.concatenate([w[f"{name}.self_attn.{x}_proj"] for x in "qkv"])
        if number == 0:
            outside["qkv"], qkv = qkv[:, : c.hidden_size], qkv[:, c.hidden_size :]
        entered_by = w[f"{name}.{'input_layernorm' if number else 'hidden_norm'}"]
        layers.append({part: w[f"{name}.{part}"] for part in _LAYER} | {"qkv": qkv, "in": entered_by})
    return outside, layers[0] if c.layers == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *layers)


def of_layer(c: Sizes, tree: Any, layer: Layer) -> Any:
    """What is of one layer; nothing is stacked where there is only one."""
    return tree if c.layers == 1 else jax.tree.map(lambda x: x[layer], tree)


def fused(c: Sizes, outside: Params, aux_mAH: jax.Array) -> jax.Array:
    """The state [m, H] that the first step begins with."""
    if c.fc_norm:
        aux_mAH = rms_norm(aux_mAH, outside["fc_norm"], c.rms_eps)
    return linear(aux_mAH.reshape(len(aux_mAH), -1), outside["fc"])


def turns(c: Sizes, positions: jax.Array) -> Turns:
    """By what queries and keys at these positions are turned, [..., R].

    Computed where they are used, XLA for CPU computes them again for each head: a tenth of a step.
    """
    return rope_tables(positions, *inverse_frequencies(c.head_dim, c.rope_theta, c.rope))


def keys_values(
    c: Sizes, w: Params, token_mY: jax.Array, state_mH: jax.Array, turns_BmR: Turns
) -> KeysValues:
    """Keys and values [B * m, J * d] of one layer; `token` is the embedding's half of them, Y = 2 J d."""
    q = c.num_heads * c.head_dim
    x_mH = rms_norm(state_mH, w["in"], c.rms_eps)
    kv = linear(x_mH, w["qkv"][q:]) + token_mY
    k, v = jnp.split(kv, 2, axis=1)
    return _turned(c, k, turns_BmR).reshape(v.shape), v


def block(
    c: Sizes,
    w: Params,
    token_mY: jax.Array,
    state_mH: jax.Array,
    turns_BmR: Turns,
    read: Callable[[jax.Array], jax.Array],
    layer: Layer = 0,
) -> jax.Array:
    """The new state [B * m, H] of one layer. `token` is the embedding's half of its queries, Y = N d; `read`
    gives what queries [B, m, N, d] read of the keys and values that they see, [B * m, Y]."""
    width = c.num_heads * c.head_dim
    x_mH = rms_norm(state_mH, w["in"], c.rms_eps)
    q = linear(x_mH, w["qkv"][:width]) + token_mY
    mixed = read(_kept(_turned(c, q, turns_BmR)))
    if c.norm_before_residual:
        state_mH = jnp.where(layer == 0, x_mH, state_mH)
    state = _kept(state_mH + linear(mixed, w["self_attn.o_proj"]))
    wide = rms_norm(state, w["post_attention_layernorm"], c.rms_eps)
    gate, up, down = (w[name] for name in _MLP)
    inner = jax.nn.silu(_kept(linear(wide, gate))) * _kept(linear(wide, up))
    return state + linear(inner, down)


def _kept(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, MATMULS)


def _turned(c: Sizes, x_mY: jax.Array, turns_BmR: Turns) -> jax.Array:
    """The heads [B, m, N, d] of queries or keys."""
    tables = tuple(jax.lax.stop_gradient(x) for x in turns_BmR)
    return apply_rope(x_mY.reshape(*tables[0].shape[:2], -1, c.head_dim), tables)
