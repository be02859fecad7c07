"""What K draft steps lose against one teacher, chunk by chunk over targets.

A loss (train/losses.py) is one function of a chunk's logits and its teacher; its derivative is `jax.vjp`'s,
taken while the chunk's logits are there. The teacher of a target is computed once for all K steps. So the
largest array is [K, c, D], never [B, T, D] of any kind.

Dimensions: M targets, c a chunk of them, K TTT steps, H hidden size, D draft vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.layers import einsum
from train.losses import Loss, Taught, acceptance, acceptance_of, cross_entropy
from train.targets import CHUNK, MOST

_LOGITS = 2**29  # that are held at once, about: 2 GiB
_LEAST_REST = 1e-6  # of the mass: the largest k never hold all of it, whatever rounding says


class Teacher(NamedTuple):
    """What the target thinks at M targets: hidden states [M, H] with the logsumexp of their logits,
    log-probabilities of the draft vocabulary [M, D], or the largest k of all [M, k] with their places in the
    draft vocabulary. All are over the target's whole vocabulary."""

    argmax_M: jax.Array  # int32 draft index of the whole vocabulary's argmax; -1 if the draft lacks it
    hidden_MH: jax.Array | None = None
    lm_head_DH: jax.Array | None = None
    logsumexp_M: jax.Array | None = None  # float32
    logp_MD: jax.Array | None = None
    top_Mk: jax.Array | None = None
    top_index_Mk: jax.Array | None = None  # int32 draft index; -1 if the draft lacks it


def is_right(logits_KcD: jax.Array, argmax_c: jax.Array) -> jax.Array:
    """bool [K, c]: the head's argmax, the first of equals, is the target's. Never where that is -1 or NaN."""
    argmax_1c1 = argmax_c[None, :, None]
    place_D = jnp.arange(logits_KcD.shape[-1], dtype=jnp.int32)[None, None]

    def summed(logits_KcD: jax.Array, argmax_1c1: jax.Array) -> jax.Array:
        return jnp.where(place_D == argmax_1c1, logits_KcD, 0.0).sum(-1, keepdims=True)

    def gathered(logits_KcD: jax.Array, argmax_1c1: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits_KcD, argmax_1c1, -1, mode="clip")

    # What a TPU sums while it has the logits at hand costs CPUs two more passes over them.
    its_Kc1 = jax.lax.platform_dependent(logits_KcD, argmax_1c1, tpu=summed, default=gathered)
    loses = (logits_KcD < its_Kc1) | ((logits_KcD == its_Kc1) & (place_D >= argmax_1c1))
    return loses.all(-1) & (argmax_c[None] >= 0)


class Reads(NamedTuple):
    """Which of a rollout's states [K, C, H] is read for which target at which step; each is once at most."""

    place_MK: jax.Array  # int32, into [K * C]; K * C where there is none
    reader_KC: jax.Array  # int32, into [K * M], the inverse; K * M where there is none


class Scores(NamedTuple):
    """Per target and step, float32 [M, K]."""

    loss: jax.Array  # cross entropy
    correct: jax.Array  # 1 where the head's argmax is the target's
    alpha: jax.Array  # acceptance at temperature 1
    drawn: jax.Array  # the same, given that the target drew what the text says; 0 where no text is given


def _taught(teacher: Teacher, start: jax.Array, logits_KcD: jax.Array) -> Taught:
    """The teacher of the chunk at `start`, beside the head's logits there."""

    def part(x):
        return jax.lax.dynamic_slice_in_dim(x, start, logits_KcD.shape[1])

    logsumexp_c = jnp.float32(0)
    if teacher.top_Mk is not None:
        t_KcD = _filled_up(part(teacher.top_Mk), part(teacher.top_index_Mk), logits_KcD)
    elif teacher.logp_MD is not None:
        t_KcD = part(teacher.logp_MD).astype(jnp.float32)[None]
    else:
        t_KcD = einsum("ch,dh->cd", part(teacher.hidden_MH), teacher.lm_head_DH)[None]
        logsumexp_c = part(teacher.logsumexp_M)
    lse_Kc = jax.nn.logsumexp(t_KcD, axis=-1)
    # What was stored is rounded, and so the mass can exceed 1.
    mass_c = jnp.minimum(jnp.exp(lse_Kc[0] - logsumexp_c), 1.0)
    return Taught(t_KcD - lse_Kc[..., None], mass_c, part(teacher.argmax_M))


def _filled_up(top_ck: jax.Array, index_ck: jax.Array, logits_KcD: jax.Array) -> jax.Array:
    """Log-probabilities [K, c, D] of a target of which k are known; the rest of its mass is the draft's other
    tokens'.

    It is divided as the head itself divides it, for the teacher says nothing about them. So a loss's
    gradient is that of all of the others taken as one token, whose probability is the rest.
    """
    _, c, D = logits_KcD.shape
    top_ck = top_ck.astype(jnp.float32)
    lacking_c = -jnp.expm1(top_ck[:, 0]) - jnp.exp(top_ck[:, 1:]).sum(-1)  # 1 - the sum, of a p near 1 too
    rest_c = jnp.maximum(lacking_c, _LEAST_REST)
    row_c1 = jnp.arange(c, dtype=jnp.int32)[:, None]
    place_ck = jnp.where(index_ck < 0, D, index_ck)
    known_cD = jnp.full((c, D), -jnp.inf).at[row_c1, place_ck].set(top_ck, mode="drop")
    is_known_1cD = jnp.isfinite(known_cD)[None]
    others_KcD = jnp.where(is_known_1cD, -jnp.inf, logits_KcD)
    share_KcD = others_KcD - jax.nn.logsumexp(others_KcD, axis=-1, keepdims=True)
    return jnp.where(is_known_1cD, known_cD[None], share_KcD + jnp.log(rest_c)[None, :, None])


def chunk_size(M: int, logits: int, dtype: Any) -> int:
    """How many of M targets, each with so many logits [K, D], are taken at a time.

    Each chunk adds to the gradient [D, H] of the output matrix. On accelerators that waits for memory, unless
    thousands of rows, K of each target, share it: of a step of Qwen3-32B's head the TPU compiler expects
    125 ms of this with 512 targets at a time, 112 with 2,048. In float32, on CPUs, it does not, and logits
    are the larger half of what is held.
    """
    if dtype == jnp.float32:
        return CHUNK // 2
    most = min(MOST, max(1, _LOGITS // (logits * CHUNK)))
    return CHUNK * next(n for n in range(most, 0, -1) if M % (n * CHUNK) == 0)


def _chunks(M: int, count: jax.Array, chunk: int) -> jax.Array:
    """How many chunks hold `count` of M targets."""
    assert M % chunk == 0, (M, chunk)  # a slice over the end would be moved, not cut
    return -(-count // chunk)


def _read(z_PH: jax.Array, reads: Reads, start: jax.Array, chunk: int) -> jax.Array:
    """The states [K, c, H] of the targets of the chunk at `start`, zeros where there is none."""
    place_cK = jax.lax.dynamic_slice_in_dim(reads.place_MK, start, chunk)
    return z_PH.at[place_cK.T].get(mode="fill", fill_value=0)


def _put(whole: Any, part: Any, start: jax.Array) -> Any:
    """The arrays [M, K] with those of a chunk [K, c] in their places."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.T, start, 0), whole, part)


def score(
    z_KCH: jax.Array,
    reads: Reads,
    lm_head_DH: jax.Array,
    teacher: Teacher,
    count: jax.Array,
    text_M: jax.Array | None = None,
) -> Scores:
    """Scores of the first `count` of M targets (M a multiple of CHUNK); the rest stay zero. `text`: the draft
    index of what the text says, -1 if the draft lacks it."""
    M, K = reads.place_MK.shape
    chunk, z_PH = chunk_size(M, K * len(lm_head_DH), z_KCH.dtype), z_KCH.reshape(-1, z_KCH.shape[-1])

    def step(number, scores):
        start = number * chunk
        l_KcD = einsum("kch,dh->kcd", _read(z_PH, reads, start, chunk), lm_head_DH)
        taught = _taught(teacher, start, l_KcD)
        right_Kc = is_right(l_KcD, taught.argmax_c).astype(jnp.float32)
        drawn_Kc = jnp.zeros_like(right_Kc)
        if text_M is not None:
            text_c = jax.lax.dynamic_slice_in_dim(text_M, start, chunk)
            drawn_Kc = acceptance_of(l_KcD, taught, text_c)
        new = Scores(cross_entropy(l_KcD, taught), right_Kc, acceptance(l_KcD, taught), drawn_Kc)
        return _put(scores, new, start)

    zeros = Scores(*(jnp.zeros((M, K), jnp.float32) for _ in Scores._fields))
    return jax.lax.fori_loop(0, _chunks(M, count, chunk), step, zeros)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    loss: Loss,
    z_KCH: jax.Array,
    reads: Reads,
    lm_head_DH: jax.Array,
    weight_MK: jax.Array,
    teacher: Teacher,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum over the first `count` targets of weight * loss, loss [M, K], correct [M, K]); float32.

    `weight_MK` is zero where a step does not count. Only the first has a gradient, to `z` and `lm_head`.
    """
    return _loss_and_gradients(loss, z_KCH, reads, lm_head_DH, weight_MK, teacher, count)[0]


def _loss_and_gradients(loss, z_KCH, reads, lm_head_DH, weight_MK, teacher, count):
    (M, K), H = weight_MK.shape, z_KCH.shape[-1]
    chunk, z_PH = chunk_size(M, K * len(lm_head_DH), z_KCH.dtype), z_KCH.reshape(-1, H)

    # What is large has the steps first: TPUs hold the last two dimensions in tiles of 8 x 128.
    def step(number, carry):
        total, by_target, dz_KMH, dw_HD = carry
        start = number * chunk
        z_KcH = _read(z_PH, reads, start, chunk)
        weight_Kc = jax.lax.dynamic_slice_in_dim(weight_MK, start, chunk).T
        l_KcD = einsum("kch,dh->kcd", z_KcH, lm_head_DH)
        taught = _taught(teacher, start, l_KcD)
        loss_Kc, pull = jax.vjp(lambda logits: loss(logits, taught), l_KcD)
        d_KcD = pull(weight_Kc)[0].astype(z_KcH.dtype)
        right_Kc = is_right(l_KcD, taught.argmax_c).astype(jnp.float32)
        dz_KcH = einsum("kcd,dh->kch", d_KcD, lm_head_DH).astype(z_KcH.dtype)
        rows = K * chunk  # one dimension: XLA for CPU sums over two more slowly, as it does with D first
        return (
            total + (loss_Kc * weight_Kc).sum(),
            _put(by_target, (loss_Kc, right_Kc), start),
            jax.lax.dynamic_update_slice_in_dim(dz_KMH, dz_KcH, start, 1),
            dw_HD + einsum("rh,rd->hd", z_KcH.reshape(rows, -1), d_KcD.reshape(rows, -1)),
        )

    zero_MK = jnp.zeros(weight_MK.shape, jnp.float32)
    carry = (
        jnp.float32(0),
        (zero_MK, zero_MK),
        jax.lax.empty((K, M, H), z_KCH.dtype),  # of targets that do not count nothing is read
        jnp.zeros(lm_head_DH.T.shape, jnp.float32),
    )
    total, by_target, dz, dw_HD = jax.lax.fori_loop(0, _chunks(M, count, chunk), step, carry)
    return (total, *by_target), (dz, dw_HD.astype(lm_head_DH.dtype).T, reads)


def _pull_back(loss, saved, cotangents):
    dz_KMH, dw, reads = saved
    g = cotangents[0]
    dz_KCH = dz_KMH.reshape(-1, dz_KMH.shape[-1]).at[reads.reader_KC].get(mode="fill", fill_value=0)
    return (dz_KCH * g.astype(dz_KCH.dtype)), None, (dw * g.astype(dw.dtype)), None, None, None


weighted_loss.defvjp(_loss_and_gradients, _pull_back)
