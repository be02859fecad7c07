"""Soft cross entropy of K draft steps against one teacher, chunk by chunk over target positions.

The teacher of a position is computed once for all K steps, and gradients are computed beside the loss while a
chunk's logits are there; so the largest array is [chunk, K, V], never [B, T, V] of any kind.

Dimensions: M target positions, c a chunk of them, K TTT steps, H hidden size, V draft vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.layers import einsum

CHUNK = 128  # target positions a chunk: 128 * 7 rows fill a matmul; `make bench` measures it


class Teacher(NamedTuple):
    """What the target thinks of M positions: hidden states [M, H], or its draft-vocabulary logits [M, V]."""

    hidden_MH: jax.Array | None
    lm_head_VH: jax.Array | None
    logits_MV: jax.Array | None
    logsumexp_M: jax.Array  # float32, over the target's whole vocabulary
    argmax_M: jax.Array  # int32 draft index of the whole vocabulary's argmax; -1 if the draft lacks it


class Scores(NamedTuple):
    """Per target position and step, float32 [M, K]."""

    loss: jax.Array  # cross entropy with the renormalised teacher (formula: EAGLE-3, arXiv 2503.01840)
    correct: jax.Array  # 1 where the head's argmax is the target's
    alpha: jax.Array  # sum_v min(p_v, q_v), p over the whole vocabulary: acceptance at temperature 1


def _chunk_of(tree: Any, start: jax.Array, size: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _chunk_scores(z_cKH, lm_head_VH, teacher: Teacher):
    """(Scores of a chunk, q [c, K, V] and p [c, 1, V]: the head's and the renormalised teacher's)."""
    t_cV = teacher.logits_MV
    if t_cV is None:
        t_cV = einsum("ch,vh->cv", teacher.hidden_MH, teacher.lm_head_VH)
    t_cV = t_cV.astype(jnp.float32)
    draft_lse_c = jax.nn.logsumexp(t_cV, axis=-1)
    p_cV = jnp.exp(t_cV - draft_lse_c[:, None])
    mass_c = jnp.exp(draft_lse_c - teacher.logsumexp_M)  # the share of p that the draft vocabulary holds

    l_cKV = einsum("ckh,vh->ckv", z_cKH, lm_head_VH)
    top_cK = l_cKV.max(-1)
    e_cKV = jnp.exp(l_cKV - top_cK[..., None])
    total_cK = e_cKV.sum(-1)
    q_cKV = e_cKV / total_cK[..., None]
    loss_cK = top_cK + jnp.log(total_cK) - (p_cV[:, None] * l_cKV).sum(-1)

    known_c = teacher.argmax_M >= 0
    at_argmax = jnp.take_along_axis(l_cKV, jnp.maximum(teacher.argmax_M, 0)[:, None, None], axis=-1)[..., 0]
    correct_cK = (at_argmax >= top_cK) & known_c[:, None]
    alpha_cK = jnp.minimum(p_cV[:, None] * mass_c[:, None, None], q_cKV).sum(-1)
    return Scores(loss_cK, correct_cK.astype(jnp.float32), alpha_cK), q_cKV, p_cV[:, None]


def score(z_MKH: jax.Array, lm_head_VH: jax.Array, teacher: Teacher, count: jax.Array) -> Scores:
    """Scores of the first `count` of M positions (M a multiple of CHUNK); the rest stay zero."""

    def step(number, scores):
        start = number * CHUNK
        z = jax.lax.dynamic_slice_in_dim(z_MKH, start, CHUNK)
        new, _, _ = _chunk_scores(z, lm_head_VH, _slice_teacher(teacher, start))
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), scores, new)

    M, K, _ = z_MKH.shape
    zeros = Scores(*(jnp.zeros((M, K), jnp.float32) for _ in Scores._fields))
    return jax.lax.fori_loop(0, -(-count // CHUNK), step, zeros)


def _slice_teacher(teacher: Teacher, start: jax.Array) -> Teacher:
    return _chunk_of(teacher._replace(lm_head_VH=None), start, CHUNK)._replace(lm_head_VH=teacher.lm_head_VH)


@jax.custom_vjp
def weighted_loss(
    z_MKH: jax.Array, lm_head_VH: jax.Array, weight_MK: jax.Array, teacher: Teacher, count: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum over the first `count` positions of weight * loss, loss [M, K], correct [M, K]); float32.

    `weight_MK` is zero where a step does not count. Only the loss has a gradient, to `z` and `lm_head`.
    """
    return _loss_and_gradients(z_MKH, lm_head_VH, weight_MK, teacher, count)[0]


def _loss_and_gradients(z_MKH, lm_head_VH, weight_MK, teacher, count):
    def step(number, carry):
        loss, loss_MK, correct_MK, dz_MKH, dw_VH = carry
        start = number * CHUNK
        z = jax.lax.dynamic_slice_in_dim(z_MKH, start, CHUNK)
        w = jax.lax.dynamic_slice_in_dim(weight_MK, start, CHUNK)
        scores, q_cKV, p_c1V = _chunk_scores(z, lm_head_VH, _slice_teacher(teacher, start))
        d_cKV = ((q_cKV - p_c1V) * w[..., None]).astype(z.dtype)
        put = jax.lax.dynamic_update_slice_in_dim
        dz = einsum("ckv,vh->ckh", d_cKV, lm_head_VH).astype(z.dtype)
        rows = CHUNK * z.shape[1]
        dw = einsum("rv,rh->vh", d_cKV.reshape(rows, -1), z.reshape(rows, -1))
        return (
            loss + (scores.loss * w).sum(),
            put(loss_MK, scores.loss, start, 0),
            put(correct_MK, scores.correct, start, 0),
            put(dz_MKH, dz, start, 0),
            dw_VH + dw,
        )

    zero = (
        jnp.float32(0),
        jnp.zeros(weight_MK.shape, jnp.float32),
        jnp.zeros(weight_MK.shape, jnp.float32),
        jnp.zeros_like(z_MKH),
        jnp.zeros(lm_head_VH.shape, jnp.float32),
    )
    loss, loss_MK, correct_MK, dz, dw = jax.lax.fori_loop(0, -(-count // CHUNK), step, zero)
    return (loss, loss_MK, correct_MK), (dz, dw.astype(lm_head_VH.dtype))


def _pull_back(saved, cotangents):
    dz, dw = saved
    g = cotangents[0]
    return (dz * g.astype(dz.dtype)), (dw * g.astype(dw.dtype)), None, None, None


weighted_loss.defvjp(_loss_and_gradients, _pull_back)
