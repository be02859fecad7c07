"""What a head is worth, from its scores on counted positions.

- acc_k: the head's top token of step k is the target's; targets outside of the draft vocabulary are misses.
- full_acc_k: steps 0..k are all right. cond_acc_k: step k is right where steps 0..k-1 were.
- alpha_k: mean of sum_v min(p_v, q_v), the acceptance at temperature 1.
- length_greedy = 1 + sum_k full_acc_k: tokens a step of greedy chain drafting, exact where the text is the
  target's own greedy output. length_sampled = 1 + sum_k prod_{j<=k} alpha_j.
- coverage: share of counted positions whose target lies in the draft vocabulary.

full_acc and cond_acc are taken over the indices at which steps 0..k all count. A share of nothing is 0.

Dimensions: M target positions, n positions, K steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.loss import Scores


class Sums(NamedTuple):
    """Sums over counted positions, [K] each; they add up over batches and chips."""

    counted: Any
    correct: Any
    alpha: Any
    chains: Any  # indices at which steps 0..k all count
    chains_right: Any  # and are right
    chains_open: Any  # and are right up to k-1
    covered: Any  # targets in the draft vocabulary
    loss: Any  # over the covered ones


def shard_sums(scores: Scores, valid_MK: jax.Array, known_M: jax.Array, targets_M: jax.Array, n: int) -> Sums:
    """The sums of one shard. `known_M`: the target's argmax has a place in the draft vocabulary."""
    counts, right = valid_MK, valid_MK & (scores.correct > 0)
    taught = counts & known_M[:, None]
    whole, good = _by_index(counts, targets_M, n), _by_index(right, targets_M, n)
    # TTT is a chain: what step k is worth depends on all steps before it at the same index.
    whole, good = (jnp.cumprod(x.astype(jnp.int32), axis=1) > 0 for x in (whole, good))
    before = jnp.concatenate([jnp.ones((n, 1), bool), good[:, :-1]], axis=1)

    def total(x):
        return x.astype(jnp.float32).sum(0)

    return Sums(
        counted=total(counts),
        correct=total(right),
        alpha=total(jnp.where(counts, scores.alpha, 0.0)),
        chains=total(whole),
        chains_right=total(good),
        chains_open=total(whole & before),
        covered=total(taught),
        loss=total(jnp.where(taught, scores.loss, 0.0)),
    )


def _by_index(flags_MK: jax.Array, targets_M: jax.Array, n: int) -> jax.Array:
    """bool [n, K] by drafting index i = j - 1 - k of target j at step k; False where there is none."""
    K = flags_MK.shape[1]
    index_MK = targets_M[:, None] - 1 - jnp.arange(K, dtype=targets_M.dtype)[None]
    # A flag that is set has its index inside; the others may fall anywhere, so they go out of range.
    place = jnp.where(flags_MK, index_MK * K + jnp.arange(K, dtype=index_MK.dtype)[None], n * K)
    return jnp.zeros(n * K, bool).at[place].set(True, mode="drop").reshape(n, K)


def add(a: Sums | None, b: Sums) -> Sums:
    """Sums of two parts, in float64: a float32 no longer counts by ones beyond 16.7 million."""
    new = Sums(*(np.asarray(x, np.float64) for x in b))
    return new if a is None else Sums(*(x + y for x, y in zip(a, new, strict=True)))


def shares(parts: np.ndarray, of: np.ndarray) -> list[float]:
    """parts / of, 0 where there is nothing to share."""
    return (np.asarray(parts) / np.maximum(of, 1)).tolist()


def summarise(sums: Sums) -> dict[str, Any]:
    """The metrics by name: lists of K, and numbers."""
    full, alpha = shares(sums.chains_right, sums.chains), shares(sums.alpha, sums.counted)
    return {
        "acc": shares(sums.correct, sums.counted),
        "cond_acc": shares(sums.chains_right, sums.chains_open),
        "full_acc": full,
        "alpha": alpha,
        "loss": shares(sums.loss, sums.covered),
        "length_greedy": 1 + sum(full),
        "length_sampled": 1 + float(np.cumprod(alpha).sum()),
        "coverage": shares(sums.covered[:1], sums.counted[:1])[0],
        "counted": int(sums.counted[0]),
    }
