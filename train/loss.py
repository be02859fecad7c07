"""What K draft steps lose against one teacher, chunk by chunk over targets.

A loss is one function of a chunk's logits and its teacher; its derivative is `jax.vjp`'s, taken while the
chunk's logits are there. The teacher of a target is computed once for all K steps. So the largest array is
[CHUNK, K, D], never [B, T, D] of any kind.

Dimensions: M targets, c a chunk of them, K TTT steps, H hidden size, D draft vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.layers import einsum
from train.targets import CHUNK


class Teacher(NamedTuple):
    """What the target thinks at M targets: hidden states [M, H], or its draft-vocabulary logits [M, D]."""

    hidden_MH: jax.Array | None
    lm_head_DH: jax.Array | None
    logits_MD: jax.Array | None
    logsumexp_M: jax.Array  # float32, over the target's whole vocabulary
    argmax_M: jax.Array  # int32 draft index of the whole vocabulary's argmax; -1 if the draft lacks it


class Taught(NamedTuple):
    """The target's distribution at the targets of a chunk."""

    p_cD: jax.Array  # over the draft vocabulary, renormalised
    mass_c: jax.Array  # the share of the whole distribution that the draft vocabulary holds, at most 1
    argmax_c: jax.Array  # int32, as in Teacher


Loss = Callable[[jax.Array, Taught], jax.Array]  # (float32 logits [c, K, D], teacher) -> float32 [c, K]


def cross_entropy(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """-sum_v p_v log q_v with the renormalised teacher (EAGLE-3, arXiv 2503.01840)."""
    return jax.nn.logsumexp(logits_cKD, axis=-1) - (taught.p_cD[:, None] * logits_cKD).sum(-1)


def is_right(logits_cKD: jax.Array, argmax_c: jax.Array) -> jax.Array:
    """bool [c, K]: the head's argmax, the first of equals, is the target's. Never where that is -1 or NaN."""
    place_D = jnp.arange(logits_cKD.shape[-1], dtype=jnp.int32)[None, None]
    argmax_c11 = argmax_c[:, None, None]
    its = jnp.take_along_axis(logits_cKD, jnp.maximum(argmax_c11, 0), axis=-1)
    loses = (logits_cKD < its) | ((logits_cKD == its) & (place_D >= argmax_c11))
    return loses.all(-1) & (argmax_c[:, None] >= 0)


def acceptance(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v min(p_v, q_v) [c, K], p over the whole vocabulary: acceptance at temperature 1."""
    p_cD = taught.p_cD * taught.mass_c[:, None]
    return jnp.minimum(p_cD[:, None], jax.nn.softmax(logits_cKD, axis=-1)).sum(-1)


class Scores(NamedTuple):
    """Per target and step, float32 [M, K]."""

    loss: jax.Array  # cross entropy
    correct: jax.Array  # 1 where the head's argmax is the target's
    alpha: jax.Array  # acceptance at temperature 1


def _taught(teacher: Teacher, start: jax.Array) -> Taught:
    """The teacher of the chunk at `start`."""

    def part(x):
        return jax.lax.dynamic_slice_in_dim(x, start, CHUNK)

    if teacher.logits_MD is None:
        t_cD = einsum("ch,dh->cd", part(teacher.hidden_MH), teacher.lm_head_DH)
    else:
        t_cD = part(teacher.logits_MD).astype(jnp.float32)
    lse_c = jax.nn.logsumexp(t_cD, axis=-1)
    # The logsumexp is of exact states, the logits may be of rounded ones, whose mass can exceed 1.
    mass_c = jnp.minimum(jnp.exp(lse_c - part(teacher.logsumexp_M)), 1.0)
    return Taught(jnp.exp(t_cD - lse_c[:, None]), mass_c, part(teacher.argmax_M))


def _chunks(M: int, count: jax.Array) -> jax.Array:
    """How many chunks hold `count` of M targets."""
    assert M % CHUNK == 0, (M, CHUNK)  # a slice over the end would be moved, not cut
    return -(-count // CHUNK)


def _put(whole: Any, part: Any, start: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), whole, part)


def score(z_MKH: jax.Array, lm_head_DH: jax.Array, teacher: Teacher, count: jax.Array) -> Scores:
    """Scores of the first `count` of M targets (M a multiple of CHUNK); the rest stay zero."""

    def step(number, scores):
        start = number * CHUNK
        taught = _taught(teacher, start)
        l_cKD = einsum("ckh,dh->ckd", jax.lax.dynamic_slice_in_dim(z_MKH, start, CHUNK), lm_head_DH)
        right_cK = is_right(l_cKD, taught.argmax_c).astype(jnp.float32)
        new = Scores(cross_entropy(l_cKD, taught), right_cK, acceptance(l_cKD, taught))
        return _put(scores, new, start)

    M, K, _ = z_MKH.shape
    zeros = Scores(*(jnp.zeros((M, K), jnp.float32) for _ in Scores._fields))
    return jax.lax.fori_loop(0, _chunks(M, count), step, zeros)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    loss: Loss,
    z_MKH: jax.Array,
    lm_head_DH: jax.Array,
    weight_MK: jax.Array,
    teacher: Teacher,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum over the first `count` targets of weight * loss, loss [M, K], correct [M, K]); float32.

    `weight_MK` is zero where a step does not count. Only the first has a gradient, to `z` and `lm_head`.
    """
    return _loss_and_gradients(loss, z_MKH, lm_head_DH, weight_MK, teacher, count)[0]


def _loss_and_gradients(loss, z_MKH, lm_head_DH, weight_MK, teacher, count):
    def step(number, carry):
        total, by_target, dz_MKH, dw_DH = carry
        start = number * CHUNK
        taught = _taught(teacher, start)
        z_cKH, weight_cK = (jax.lax.dynamic_slice_in_dim(x, start, CHUNK) for x in (z_MKH, weight_MK))
        l_cKD = einsum("ckh,dh->ckd", z_cKH, lm_head_DH)
        loss_cK, pull = jax.vjp(lambda logits: loss(logits, taught), l_cKD)
        (d_cKD,) = pull(weight_cK)
        d_cKD = d_cKD.astype(z_cKH.dtype)
        right_cK = is_right(l_cKD, taught.argmax_c).astype(jnp.float32)
        rows = CHUNK * z_cKH.shape[1]  # one dimension: XLA for CPU sums over two more slowly
        dz_cKH = einsum("ckd,dh->ckh", d_cKD, lm_head_DH).astype(z_cKH.dtype)
        return (
            total + (loss_cK * weight_cK).sum(),
            _put(by_target, (loss_cK, right_cK), start),
            _put(dz_MKH, dz_cKH, start),
            dw_DH + einsum("rd,rh->dh", d_cKD.reshape(rows, -1), z_cKH.reshape(rows, -1)),
        )

    zero_MK = jnp.zeros(weight_MK.shape, jnp.float32)
    carry = (
        jnp.float32(0),
        (zero_MK, zero_MK),
        jnp.zeros_like(z_MKH),
        jnp.zeros(lm_head_DH.shape, jnp.float32),
    )
    total, by_target, dz, dw = jax.lax.fori_loop(0, _chunks(len(z_MKH), count), step, carry)
    return (total, *by_target), (dz, dw.astype(lm_head_DH.dtype))


def _pull_back(loss, saved, cotangents):
    dz, dw = saved
    g = cotangents[0]
    return (dz * g.astype(dz.dtype)), (dw * g.astype(dw.dtype)), None, None, None


weighted_loss.defvjp(_loss_and_gradients, _pull_back)
