"""The TTT rollout of an EAGLE3 head over one shard of packed rows.

At step k index i takes token i+1+k and the block's own output of step k-1; its query sees step 0's keys of
its document up to i and its own keys of steps 1..k. Source: EAGLE-3 (arXiv 2503.01840), section 3.

Queries and MLP run on the live indices of train/targets.py; keys and values of step 0 on all positions. The
embedding's half of the q, k, v projections depends on the token alone: it is computed once for all steps.

Dimensions: B rows, T positions, n = B * T, C live indices, m indices of a block, K steps, H hidden, N query
heads, J key/value heads, G = N // J, d head_dim, X = (N + 2J) d.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.attention import attend
from common.codec import decode
from common.layers import apply_rope, linear, rms_norm, rope_tables, swiglu
from common.rope import inverse_frequencies
from train.batch import Batch, Frozen, Params, embeddings
from train.heads.eagle3.own_keys import KeysValues, join
from train.heads.eagle3.sizes import Sizes
from train.targets import ahead, permute, slots
from train.ttt import Step, rolled

_BLOCK = ("hidden_norm", "self_attn.o_proj", "post_attention_layernorm")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def weights(c: Sizes, params: Params, dtype: Any) -> tuple[Params, Params]:
    """(what comes before the block, the block): matrices in `dtype`, norms as they are.

    The q, k, v projections are one matrix [X, H] for the embedding's half of their input and one for the
    state's.
    """
    w = {name.removesuffix(".weight"): x.astype(dtype) if x.ndim > 1 else x for name, x in params.items()}
    qkv = jnp.concatenate([w[f"midlayer.self_attn.{x}_proj"] for x in "qkv"])
    before = {"fc": w["fc"], "norm": w["midlayer.input_layernorm"], "qkv": qkv[:, : c.hidden_size]}
    block = {name: w[f"midlayer.{name}"] for name in _BLOCK + _MLP}
    return before, block | {"qkv": qkv[:, c.hidden_size :], "norm": w["norm"]}


def keys_values(
    c: Sizes, w: Params, token_mX: jax.Array, state_mH: jax.Array, positions_m: jax.Array
) -> KeysValues:
    """Keys and values [m, J, d] of the transformer block; `token` is the embedding's half of its q, k, v."""
    q, J, d = c.num_heads * c.head_dim, c.num_kv_heads, c.head_dim
    x_mH = rms_norm(state_mH, w["hidden_norm"], c.rms_eps)
    kv = linear(x_mH, w["qkv"][q:]) + token_mX[:, q:]
    k, v = (half.reshape(-1, J, d) for half in jnp.split(kv, 2, axis=1))
    return _rope(c, k, positions_m), v


def block(
    c: Sizes,
    w: Params,
    token_mX: jax.Array,
    state_mH: jax.Array,
    positions_m: jax.Array,
    read: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The new state [m, H] of the transformer block. `read` gives what queries [m, N, d] read of the keys and
    values that they see."""
    width = c.num_heads * c.head_dim
    x_mH = rms_norm(state_mH, w["hidden_norm"], c.rms_eps)
    q = linear(x_mH, w["qkv"][:width]) + token_mX[:, :width]
    mixed = read(_rope(c, q.reshape(-1, c.num_heads, c.head_dim), positions_m))
    state = state_mH + linear(mixed.reshape(-1, width), w["self_attn.o_proj"])
    wide = rms_norm(state, w["post_attention_layernorm"], c.rms_eps)
    return state + swiglu(wide, *(w[name] for name in _MLP))


def _rope(c: Sizes, x_mNd: jax.Array, positions_m: jax.Array) -> jax.Array:
    inverse, factor = inverse_frequencies(c.head_dim, c.rope_theta, c.rope)
    return apply_rope(x_mNd[None], rope_tables(positions_m[None], inverse, factor))[0]


class _Places(NamedTuple):
    """Where positions and live indices are."""

    live: jax.Array  # int32 [C]
    slot: jax.Array  # int32 [K + n], the inverse, behind K places that are free
    positions_n: jax.Array
    segments_BT: jax.Array


class _Shared(NamedTuple):
    """What all steps read. The embedding's half of q, k, v and step 0's keys and values: of all positions."""

    w: Params
    token_nX: jax.Array
    first: KeysValues


def rollout(c: Sizes, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any) -> jax.Array:
    """The final-normed states [K, C, H], in `dtype`, of every live index."""
    n = batch.tokens.size
    before, w = weights(c, params, dtype)
    embedded = embeddings(frozen, batch).astype(dtype)
    token_nX = linear(rms_norm(embedded, before["norm"], c.rms_eps), before["qkv"])
    aux = decode(batch.aux_hidden, batch.aux_scale).astype(dtype)
    state_nH = linear(aux.reshape(n, -1), before["fc"])
    slot = slots(batch.live, n)
    C, by = len(batch.live), ahead(0)
    free = jnp.full((steps,), C, jnp.int32)
    at = _Places(batch.live, jnp.concatenate([free, slot]), batch.positions.reshape(n), batch.segment_ids)
    token = jnp.concatenate([token_nX[by:], token_nX[-by:]])  # behind the last there is none
    first = keys_values(c, w, token, state_nH, at.positions_n)
    shared = _Shared(w, token_nX, first)
    ttt = Step(partial(_make, c), partial(_advance, c))
    states_KCH = rolled(ttt, steps, at, shared, permute(state_nH, batch.live, slot))
    return rms_norm(states_KCH, w["norm"], c.rms_eps)


def _inputs(at: _Places, k: jax.Array, token_nX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the tokens' half [C, X], positions [C]) of the live indices at step k."""
    n, by = len(token_nX), ahead(k)
    # The index that reads a position is `by` before it.
    inverse = jax.lax.dynamic_slice_in_dim(at.slot, len(at.slot) - n - by, n)
    return permute(token_nX, at.live + by, inverse), at.positions_n.at[at.live].get(mode="clip") + k


def _make(c: Sizes, at: _Places, k: jax.Array, shared: _Shared, state_CH: jax.Array) -> KeysValues:
    token_CX, positions = _inputs(at, k, shared.token_nX)
    return keys_values(c, shared.w, token_CX, state_CH, positions)


def _advance(
    c: Sizes, at: _Places, k: jax.Array, shared: _Shared, state_CH: jax.Array, own: KeysValues
) -> jax.Array:
    token_CX, positions = _inputs(at, k, shared.token_nX)
    read = partial(_read, c, at, k, shared.first, own)
    return block(c, shared.w, token_CX, state_CH, positions, read)


def _read(
    c: Sizes, at: _Places, k: jax.Array, first: KeysValues, own: KeysValues, q_CNd: jax.Array
) -> jax.Array:
    """What the live indices' queries read of step 0's keys of all positions and of their own ones of steps
    1..k."""
    (B, T), n = at.segments_BT.shape, at.segments_BT.size
    rows, slot = (B, T, -1, c.head_dim), at.slot[-n:]
    scale = c.head_dim**-0.5
    q = permute(q_CNd, slot, at.live).reshape(rows)
    read = attend(q, *(x.reshape(rows) for x in first), at.segments_BT, scale, return_lse=True)
    base, lse = (permute(x.reshape(n, *x.shape[2:]), at.live, slot) for x in read)
    return join(scale, base, lse, q_CNd, own, k)
