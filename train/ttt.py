"""The TTT rollout of an EAGLE3 head over one shard of packed rows, and its loss.

At step k index i takes token i+1+k and the block's own output of step k-1; its query sees step 0's keys of
its document up to i and its own keys of steps 1..k. Source: EAGLE-3 (arXiv 2503.01840), section 3.

Queries, MLP and loss run on the compacted indices of `train/targets.py`; keys and values of step 0 on all.
The embedding's half of the q, k, v projections depends on the token alone: it is computed once for all steps.
What K steps keep for the backward pass is the memory of training: each keeps the results of its matmuls and
computes the rest again.

Dimensions: B rows, T positions, n = B * T, C live indices, M targets, K steps, H hidden, A aux states,
N query heads, J key/value heads, G = N // J, D head_dim, V draft vocabulary.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.attention import attend
from common.codec import decode
from common.layers import apply_rope, linear, rms_norm, rope_tables, swiglu
from common.rope import inverse_frequencies
from train.batch import Batch, Frozen, Params, pick
from train.head import HeadConfig
from train.light import light
from train.loss import Scores, Teacher, cross_entropy, score, weighted_loss
from train.targets import ahead, drafting_index, slots, valid_targets


@jax.custom_vjp
def rearrange(x: jax.Array, there: jax.Array, back: jax.Array) -> jax.Array:
    """x[there], zeros where `there` is out of range. `there` uses a row once at most and `back` is its
    inverse, so that the gradient is a gather too."""
    return x.at[there].get(mode="fill", fill_value=0)


rearrange.defvjp(
    lambda x, there, back: (rearrange(x, there, back), back),
    lambda back, g: (g.at[back].get(mode="fill", fill_value=0), None, None),
)


def _ahead(x: jax.Array, by: int, fill: int) -> jax.Array:
    """y[i] = x[i - by], `fill` before."""
    return jnp.concatenate([jnp.full((min(by, len(x)),), fill, x.dtype), x[: max(len(x) - by, 0)]])


def _rope(x_cND: jax.Array, positions_c: jax.Array, c: HeadConfig) -> jax.Array:
    inverse, factor = inverse_frequencies(c.head_dim, c.rope_theta, c.rope)
    return apply_rope(x_cND[None], rope_tables(positions_c[None], inverse, factor))[0]


def _join(base_CND, lse_CN, q_CND, keys, values, scale: float) -> jax.Array:
    """Attention over step 0's keys (already summed up as `base` and its logsumexp) and the own later ones."""
    if not keys:
        return base_CND
    C, N, D = q_CND.shape
    J = keys[0].shape[1]

    def grouped(x):
        return x.astype(jnp.float32).reshape(C, J, N // J, -1)

    q, lse = grouped(q_CND), grouped(lse_CN)
    scores = [(q * k[:, :, None].astype(jnp.float32)).sum(-1, keepdims=True) * scale for k in keys]
    total = reduce(jnp.logaddexp, scores, lse)
    out = grouped(base_CND) * jnp.exp(lse - total)
    for s, v in zip(scores, values, strict=True):
        out += jnp.exp(s - total) * v[:, :, None].astype(jnp.float32)
    return out.reshape(C, N, D).astype(base_CND.dtype)


class _Shared(NamedTuple):
    """What every step uses. Weights are in the computing dtype, norms in float32."""

    weights: Params
    by_state: jax.Array  # [(N + 2J) D, H], the state's half of the q, k, v projections
    token_nX: jax.Array  # [n, (N + 2J) D], the embeddings' half, projected
    k_BTJD: jax.Array  # of step 0
    v_BTJD: jax.Array


class _Places(NamedTuple):
    """Where the live indices are."""

    live: jax.Array  # int32 [C]
    slot: jax.Array  # int32 [n]
    positions_C: jax.Array
    segments_BT: jax.Array


def _aux(batch: Batch, dtype: Any) -> jax.Array:
    """Aux states side by side, [n, A * H]."""
    aux = decode(batch.aux_hidden, batch.aux_scale)
    return aux.astype(dtype).reshape(aux.shape[0] * aux.shape[1], -1)


def rollout(
    c: HeadConfig, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
) -> list[jax.Array]:
    """The final-normed states of every live index, [C, H] in `dtype`, of every step."""
    B, T = batch.tokens.shape
    n, N, J, D = B * T, c.num_heads, c.num_kv_heads, c.head_dim
    p = {name: w.astype(dtype) if w.ndim > 1 else w for name, w in params.items()}  # norms stay float32
    qkv = jnp.concatenate([p.pop(f"midlayer.self_attn.{x}_proj.weight") for x in "qkv"])
    by_token, by_state = qkv[:, : c.hidden_size], qkv[:, c.hidden_size :]

    embedded = frozen.embed[batch.tokens.reshape(n)].astype(dtype)
    token_nX = linear(rms_norm(embedded, p["midlayer.input_layernorm.weight"], c.rms_eps), by_token)
    fused_nH = linear(_aux(batch, dtype), p["fc.weight"])
    kv_n = linear(rms_norm(fused_nH, p["midlayer.hidden_norm.weight"], c.rms_eps), by_state[N * D :])
    kv_n = kv_n + jnp.concatenate([token_nX[1:, N * D :], token_nX[-1:, N * D :]])
    positions_n = batch.positions.reshape(n)
    k_n, v_n = (x.reshape(n, J, D) for x in jnp.split(kv_n, 2, axis=1))
    k_BTJD, v_BTJD = _rope(k_n, positions_n, c).reshape(B, T, J, D), v_n.reshape(B, T, J, D)

    slot = slots(batch.live, n)
    positions_C = positions_n.at[batch.live].get(mode="fill", fill_value=0)
    places = _Places(batch.live, slot, positions_C, batch.segment_ids)
    block = {name: w for name, w in p.items() if name not in ("fc.weight", "lm_head.weight")}
    shared = _Shared(block, by_state, token_nX, k_BTJD, v_BTJD)
    state = rearrange(fused_nH, batch.live, slot)
    keys, values, out = [], [], []
    for step in range(steps):
        advance = light(partial(_advance, c, places, step), batch.count[0] > 0)
        state, own, z = advance(shared, state, keys, values)
        if step:
            keys, values = [*keys, own[0]], [*values, own[1]]
        out.append(z)
    return out


def _advance(c: HeadConfig, at: _Places, step: int, shared: _Shared, state, keys, values):
    """One step: (the new state [C, H], the own key and value [C, J, D] unless step 0, the normed state)."""
    p, N, J, D = shared.weights, c.num_heads, c.num_kv_heads, c.head_dim
    B, T = at.segments_BT.shape
    n, C, scale = B * T, at.live.shape[0], D**-0.5

    def normed(x, name):
        return rms_norm(x, p[name], c.rms_eps)

    width = N * D if step == 0 else shared.by_state.shape[0]  # step 0 has its keys
    by = ahead(step)
    token_CX = rearrange(shared.token_nX, at.live + by, _ahead(at.slot, by, C))[:, :width]
    x = linear(normed(state, "midlayer.hidden_norm.weight"), shared.by_state[:width]) + token_CX
    q_CND, own = _rope(x[:, : N * D].reshape(C, N, D), at.positions_C + step, c), ()
    if step:
        k, v = (half.reshape(C, J, D) for half in jnp.split(x[:, N * D :], 2, axis=1))
        own = _rope(k, at.positions_C + step, c), v
        keys, values = [*keys, own[0]], [*values, own[1]]
    everywhere = rearrange(q_CND, at.slot, at.live).reshape(B, T, N, D)
    base, lse = attend(everywhere, shared.k_BTJD, shared.v_BTJD, at.segments_BT, scale, return_lse=True)
    base_CND, lse_CN = (rearrange(y, at.live, at.slot) for y in (base.reshape(n, N, D), lse.reshape(n, N)))
    mixed = _join(base_CND, lse_CN, q_CND, keys, values, scale).reshape(C, N * D)
    state = state + linear(mixed, p["midlayer.self_attn.o_proj.weight"])
    wide = normed(state, "midlayer.post_attention_layernorm.weight")
    state = state + swiglu(wide, *(p[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return state, own, normed(state, "norm.weight")


def at_targets(z_KCH: list[jax.Array], batch: Batch, valid_MK: jax.Array) -> jax.Array:
    """z [M, K, H] of the index that predicts each target at each step; zeros where that is not valid."""
    C, M, n = batch.live.shape[0], batch.targets.shape[0], batch.tokens.size
    slot, target_slot = slots(batch.live, n), slots(batch.targets, n)
    index_MK = drafting_index(batch.targets, len(z_KCH))
    states = []
    for step, z_CH in enumerate(z_KCH):
        there = jnp.where(valid_MK[:, step], slot.at[index_MK[:, step]].get(mode="clip"), C)
        back = target_slot.at[batch.live + ahead(step)].get(mode="fill", fill_value=M)
        is_read = valid_MK[:, step].at[back].get(mode="fill", fill_value=False)
        states.append(rearrange(z_CH, there, jnp.where(is_read, back, M)))
    return jnp.stack(states, 1)


def teacher(frozen: Frozen, batch: Batch, dtype: Any) -> Teacher:
    """The teacher of every target; free places hold zeros."""
    index, logsumexp = (
        frozen.draft_index[pick(batch.argmax, batch.targets)],
        pick(batch.logsumexp, batch.targets),
    )
    if frozen.lm_head is None:
        return Teacher(None, None, pick(batch.draft_logits, batch.targets), logsumexp, index)
    scale = None if batch.last_scale is None else pick(batch.last_scale, batch.targets)
    hidden = decode(pick(batch.last_hidden, batch.targets), scale)
    return Teacher(hidden.astype(dtype), frozen.lm_head.astype(dtype), None, logsumexp, index)


class StepSums(NamedTuple):
    """Sums over a shard's counted positions, float32 [K]; divide the first two by the third."""

    loss: jax.Array
    correct: jax.Array
    counted: jax.Array


def shard_loss(
    c: HeadConfig,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    weight_K: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, StepSums]:
    """(sum over this shard of weight_k * loss, sums): the loss is the shard's part of the batch's.

    `weight_K` float32 is decay^k over the number of counted positions of step k in the whole batch.
    """
    valid_MK = valid_targets(batch, weight_K.shape[0])
    z_MKH = at_targets(rollout(c, params, frozen, batch, weight_K.shape[0], dtype), batch, valid_MK)
    taught = teacher(frozen, batch, dtype)
    counts_MK = (valid_MK & (taught.argmax_M >= 0)[:, None]).astype(jnp.float32)
    lm_head = params["lm_head.weight"].astype(dtype)
    loss, per_MK, correct_MK = weighted_loss(
        cross_entropy, z_MKH, lm_head, counts_MK * weight_K[None], taught, batch.count[0]
    )
    return loss, StepSums((per_MK * counts_MK).sum(0), (correct_MK * counts_MK).sum(0), counts_MK.sum(0))


def shard_counts(frozen: Frozen, batch: Batch, steps: int) -> jax.Array:
    """float32 [K]: this shard's counted targets of every step, from positions alone."""
    known_M = frozen.draft_index[pick(batch.argmax, batch.targets)] >= 0
    return (valid_targets(batch, steps) & known_M[:, None]).sum(0).astype(jnp.float32)


def shard_scores(
    c: HeadConfig, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
) -> tuple[Scores, jax.Array]:
    """(Scores [M, K], valid [M, K]) of a shard's targets, those outside of the draft vocabulary included."""
    valid_MK = valid_targets(batch, steps)
    z_MKH = at_targets(rollout(c, params, frozen, batch, steps, dtype), batch, valid_MK)
    lm_head = params["lm_head.weight"].astype(dtype)
    return score(z_MKH, lm_head, teacher(frozen, batch, dtype), batch.count[0]), valid_MK
