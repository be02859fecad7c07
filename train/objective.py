"""What a shard of rows adds to the loss, the counts and the scores of a batch, for any kind of head.

Dimensions: B rows, T positions, n = B * T, C live indices, M targets, K steps, H hidden size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.batch import Batch, Frozen, Params, by_steps, pick
from train.heads.head import Head
from train.loss import Reads, Scores, Teacher, score, weighted_loss
from train.losses import Loss
from train.targets import ahead, drafting_index, slots, valid_targets


def reads(batch: Batch, valid_MK: jax.Array, first: int = 0) -> Reads:
    """Each target reads at each step, from `first` on, the state of the index that predicts it, where that is
    valid."""
    (M, K), C, n = valid_MK.shape, len(batch.live), batch.tokens.size
    step_K = np.arange(K, dtype=np.int32)
    drafting_MK = drafting_index(batch.targets, first + K)[:, first:]
    index_MK = slots(batch.live, n).at[drafting_MK].get(mode="clip")
    target_KC = batch.live[None] + ahead(first + step_K)[:, None]
    reader_KC = slots(batch.targets, n).at[target_KC].get(mode="fill", fill_value=M)
    is_read = valid_MK.T.at[step_K[:, None], reader_KC].get(mode="fill", fill_value=False)
    return Reads(
        jnp.where(valid_MK, C * step_K[None] + index_MK, K * C),
        jnp.where(is_read, M * step_K[:, None] + reader_KC, K * M),
    )


def teacher(frozen: Frozen, batch: Batch, dtype: Any) -> Teacher:
    """The teacher of every target; free places hold zeros."""
    index = frozen.draft_index[pick(batch.argmax, batch.targets)]
    if batch.topk_logprobs is not None:
        top, ids = (pick(x, batch.targets) for x in (batch.topk_logprobs, batch.topk_ids))
        return Teacher(index, top_Mk=top, top_index_Mk=frozen.draft_index[ids])
    if batch.draft_logprobs is not None:
        return Teacher(index, logp_MD=pick(batch.draft_logprobs, batch.targets))
    hidden, logsumexp = (pick(x, batch.targets) for x in (batch.last_hidden, batch.logsumexp))
    return Teacher(index, hidden.astype(dtype), frozen.lm_head.astype(dtype), logsumexp)


class StepSums(NamedTuple):
    """Sums over a shard's counted targets, float32 [K]; divide the first two by the third."""

    loss: jax.Array
    correct: jax.Array
    counted: jax.Array


def shard_loss(
    head: Head,
    loss: Loss,
    params: Params,
    frozen: Frozen,
    batch: Batch,
    weight_K: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, StepSums]:
    """(sum over this shard of weight_k * loss, sums): the loss is the shard's part of the batch's.

    `weight_K` float32 is decay^k over the number of counted targets of step k in the whole batch, or over how
    many of them a sample is expected to have.
    """
    K, output, totals, sums = len(weight_K), head.output(params).astype(dtype), [], []
    states = head.rollout(params, frozen, batch, K, dtype)
    for (which, part), z_KCH in zip(by_steps(batch, K), states, strict=True):
        valid_MK = valid_targets(part, which.stop)[:, which.start :]
        taught = teacher(frozen, part, dtype)
        counts_MK = (valid_MK & (taught.argmax_M >= 0)[:, None]).astype(jnp.float32)
        total, per_MK, correct_MK = weighted_loss(
            loss,
            z_KCH,
            reads(part, valid_MK, which.start),
            output,
            counts_MK * weight_K[None, which.start : which.stop],
            taught,
            part.count[0],
        )
        totals.append(total)
        sums.append([(per_MK * counts_MK).sum(0), (correct_MK * counts_MK).sum(0), counts_MK.sum(0)])
    return sum(totals[1:], totals[0]), StepSums(*map(jnp.concatenate, zip(*sums, strict=True)))


def shard_counts(frozen: Frozen, batch: Batch, steps: int) -> jax.Array:
    """float32 [K]: this shard's counted targets of every step, from positions alone."""
    known_M = frozen.draft_index[pick(batch.argmax, batch.targets)] >= 0
    return (valid_targets(batch, steps) & known_M[:, None]).sum(0).astype(jnp.float32)


def shard_scores(
    head: Head, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
) -> tuple[Scores, jax.Array, jax.Array]:
    """(Scores [M, K], valid [M, K], known [M]) of a shard's targets; `known`: in the draft vocabulary."""
    valid_MK = valid_targets(batch, steps)
    (z_KCH,) = head.rollout(params, frozen, batch, steps, dtype)
    taught = teacher(frozen, batch, dtype)
    text_M = frozen.draft_index[pick(jnp.roll(batch.tokens, -1, 1), batch.targets)]
    output = head.output(params).astype(dtype)
    scores = score(z_KCH, reads(batch, valid_MK), output, taught, batch.count[0], text_M)
    return scores, valid_MK, taught.argmax_M >= 0
