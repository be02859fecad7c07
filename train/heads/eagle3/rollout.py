"""The TTT rollout of an EAGLE3 head over one shard of packed rows.

At step k index i takes token i+1+k and the block's own output of step k-1; its query sees step 0's keys of
its document up to i and its own keys of steps 1..k. Source: EAGLE-3 (arXiv 2503.01840), section 3.

Queries and MLP run on the live indices of train/targets.py; keys and values of step 0 on all positions. The
embedding's half of the q, k, v projections depends on the token alone: it is computed once for all steps.
What K steps keep for the backward pass is the memory of training: each keeps the results of its matmuls and
computes the rest again.

Dimensions: B rows, T positions, n = B * T, C live indices, m indices of a block, K steps, H hidden, N query
heads, J key/value heads, G = N // J, d head_dim, X = (N + 2J) d.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.attention import attend
from common.codec import decode
from common.layers import apply_rope, linear, rms_norm, rope_tables, swiglu
from common.rope import inverse_frequencies
from train.batch import Batch, Frozen, Params
from train.heads.eagle3.sizes import Sizes
from train.recomputing import recomputing
from train.targets import ahead, permute, slots

KeysValues = tuple[jax.Array, jax.Array]
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


def block(
    c: Sizes,
    w: Params,
    token_mX: jax.Array,
    state_mH: jax.Array,
    positions_m: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    drafting: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[jax.Array, jax.Array, KeysValues]:
    """(new state [C, H], the same after the final norm, keys and values [m, J, d]) of the transformer block.

    `token` is the embedding's half of the q, k, v projections. `attend(q, k, v)` gives what the queries
    [C, N, d] read. `drafting` takes the C of m indices that have a query; all, if it is left out.
    """
    N, J, d = c.num_heads, c.num_kv_heads, c.head_dim

    def normed(x, name):
        return rms_norm(x, w[name], c.rms_eps)

    x_mH = normed(state_mH, "hidden_norm")
    kv = linear(x_mH, w["qkv"][N * d :]) + token_mX[:, N * d :]
    k, v = (half.reshape(-1, J, d) for half in jnp.split(kv, 2, axis=1))
    q = linear(drafting(x_mH), w["qkv"][: N * d]) + drafting(token_mX[:, : N * d])
    k = _rope(c, k, positions_m)
    mixed = attend(_rope(c, q.reshape(-1, N, d), drafting(positions_m)), k, v)
    state = drafting(state_mH) + linear(mixed.reshape(-1, N * d), w["self_attn.o_proj"])
    wide = normed(state, "post_attention_layernorm")
    state = state + swiglu(wide, *(w[name] for name in _MLP))
    return state, normed(state, "norm"), (k, v)


def _rope(c: Sizes, x_mNd: jax.Array, positions_m: jax.Array) -> jax.Array:
    inverse, factor = inverse_frequencies(c.head_dim, c.rope_theta, c.rope)
    return apply_rope(x_mNd[None], rope_tables(positions_m[None], inverse, factor))[0]


class _Places(NamedTuple):
    """Where positions and live indices are."""

    live: jax.Array  # int32 [C]
    slot: jax.Array  # int32 [n], the inverse
    positions_n: jax.Array
    segments_BT: jax.Array


def rollout(
    c: Sizes, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
) -> list[jax.Array]:
    """The final-normed states of every live index, [C, H] in `dtype`, of every step."""
    n = batch.tokens.size
    before, w = weights(c, params, dtype)
    embedded = frozen.embed[batch.tokens.reshape(n)].astype(dtype)
    token_nX = linear(rms_norm(embedded, before["norm"], c.rms_eps), before["qkv"])
    aux = decode(batch.aux_hidden, batch.aux_scale).astype(dtype)
    state = linear(aux.reshape(n, -1), before["fc"])
    at = _Places(batch.live, slots(batch.live, n), batch.positions.reshape(n), batch.segment_ids)
    seen: list[KeysValues] = []
    out = []
    for step in range(steps):
        advance = recomputing(partial(_advance, c, at, step), batch.count[0] > 0)
        state, z, made = advance(w, token_nX, state, seen)
        seen = [*seen, made]
        out.append(z)
    return out


def _advance(c: Sizes, at: _Places, step: int, w: Params, token_nX: jax.Array, state, seen: list[KeysValues]):
    """The block of all positions at step 0, of the live indices later; `seen` are the steps before."""
    n, C, by = at.positions_n.shape[0], at.live.shape[0], ahead(step)

    def drafting(x):
        return permute(x, at.live, at.slot) if x.ndim > 1 else x.at[at.live].get(mode="fill", fill_value=0)

    def read(q_CNd, k, v):
        first, *own = [*seen, (k, v)]
        return _read(c, at, q_CNd, first, own)

    if step == 0:
        token = jnp.concatenate([token_nX[by:], token_nX[-by:]])  # behind the last there is none
        return block(c, w, token, state, at.positions_n, read, drafting)
    free = jnp.full((min(by, n),), C, jnp.int32)
    token = permute(token_nX, at.live + by, jnp.concatenate([free, at.slot[: n - len(free)]]))
    return block(c, w, token, state, drafting(at.positions_n) + step, read)


def _read(c: Sizes, at: _Places, q_CNd: jax.Array, first: KeysValues, own: list[KeysValues]) -> jax.Array:
    """What the live indices' queries read of step 0's keys of all positions and of their own later ones."""
    (B, T), n = at.segments_BT.shape, at.slot.shape[0]
    rows = (B, T, -1, c.head_dim)
    scale = c.head_dim**-0.5
    everywhere = permute(q_CNd, at.slot, at.live).reshape(rows)
    read = attend(everywhere, *(x.reshape(rows) for x in first), at.segments_BT, scale, return_lse=True)
    base, lse = (permute(x.reshape(n, *x.shape[2:]), at.live, at.slot) for x in read)
    return _join(base, lse, q_CNd, own, scale) if own else base


def _join(base_CNd, lse_CN, q_CNd, own: list[KeysValues], scale: float) -> jax.Array:
    """Attention over keys that are already summed up as `base` and their logsumexp, and over the own ones."""
    C, J = q_CNd.shape[0], own[0][0].shape[1]

    def grouped(x):
        return x.astype(jnp.float32).reshape(C, J, -1, *x.shape[2:])

    q, lse = grouped(q_CNd), grouped(lse_CN)[..., None]
    scores = [(q * k[:, :, None].astype(jnp.float32)).sum(-1, keepdims=True) * scale for k, _ in own]
    total = reduce(jnp.logaddexp, scores, lse)
    out = grouped(base_CNd) * jnp.exp(lse - total)
    for s, (_, v) in zip(scores, own, strict=True):
        out += jnp.exp(s - total) * v[:, :, None].astype(jnp.float32)
    return out.reshape(base_CNd.shape).astype(base_CNd.dtype)
