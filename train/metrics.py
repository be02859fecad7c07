"""What a head is worth, from its scores on counted positions.

Two kinds of figures, which differ by some percent. By position, over all counted ones:

- acc_k: the head's top token of step k is the target's; targets outside of the draft vocabulary are misses.
- full_acc_k: steps 0..k are all right. cond_acc_k: step k is right where steps 0..k-1 were.
- alpha_k: mean of sum_v min(p_v, q_v), the acceptance at temperature 1.
- coverage: share of counted positions whose target lies in the draft vocabulary.
- own_text: share of counted positions whose text goes on with the target's own first choice; 1 on greedy
  answers of the target.

full_acc and cond_acc are taken over the indices at which steps 0..k all count. A share of nothing is 0.

By the walk of a server through each answer (train/walk.py), chains only, the target's own token counted:

- length_greedy, length_sampled: tokens a draft of K tokens, at temperature 0, and at temperature 1 where the
  draft is sampled too. length_greedy_by_k, length_sampled_by_k: of drafts of 1..K tokens.
- accepted_greedy, accepted_sampled: accepted a draft at each of its K positions.
- length_drawn and the others: at temperature 1 as well, for answers that the target itself drew there. In
  greedy answers drafts stand in other text than a server's at temperature 1: neither figure tells its length.
- drafts: how many greedy drafts of K tokens the answers took.

Dimensions: B rows, T positions, M target positions, K steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import pieces
from train.loss import Scores
from train.names import LENGTH
from train.targets import drafting_index
from train.walk import Walk, answers, by_position, lengths, walk


class Sums(NamedTuple):
    """Sums over counted positions, float32 [K] each; they add up over batches and chips."""

    counted: Any
    correct: Any
    alpha: Any
    chains: Any  # indices at which steps 0..k all count
    chains_right: Any  # and are right
    chains_open: Any  # and are right up to k-1
    greedy: Walk
    sampled: Walk
    drawn: Walk
    covered: Any = 0.0  # targets in the draft vocabulary
    loss: Any = 0.0  # over the covered ones
    own_text: Any = 0.0  # []: targets whose text says what the target says


def shard_sums(
    scores: Scores, valid_MK: jax.Array, known_M: jax.Array, batch: Any, answer_tokens: int | None = None
) -> Sums:
    """The sums of one shard; of rows in pieces the first piece's chip has those of whole rows. `known_M`: the
    target's argmax has a place in the draft vocabulary."""
    (B, T), K, own = batch.tokens.shape, valid_MK.shape[1], batch.aux_hidden.shape[1]
    taught_MK = valid_MK & known_M[:, None]
    place = _places(batch.targets, valid_MK, B * T)

    def whole(x_BTX: jax.Array) -> jax.Array:
        return x_BTX if own == T else pieces.whole_rows(x_BTX[:, :own])

    def by_index(x_MK: jax.Array) -> jax.Array:
        flat = jnp.zeros(B * T * K, x_MK.dtype).at[place].set(x_MK, mode="drop")
        return whole(flat.reshape(B, T, K))

    counted = jnp.zeros(B * T, bool).at[batch.targets].set(True, mode="drop").reshape(B, T)
    tokens, argmax = whole(batch.tokens), whole(batch.argmax)
    says = tokens[:, 2:] == argmax[:, 1:-1]  # what index i drafts first is in the text
    valid_BTK = by_index(valid_MK)
    sums = index_sums(
        valid_BTK,
        by_index(valid_MK & (scores.correct > 0)),
        by_index(jnp.where(valid_MK, scores.alpha, 0.0)),
        whole(counted),
        whole(batch.segment_ids),
        answer_tokens,
        by_index(jnp.where(valid_MK, scores.drawn, 0.0)),
    )
    sums = sums._replace(own_text=(valid_BTK[:, :-2, 0] & says).astype(jnp.float32).sum())
    if own < T:
        sums = jax.tree.map(lambda x: jnp.where(pieces.is_first(), x, 0.0), sums)
    return sums._replace(covered=_total(taught_MK), loss=_total(jnp.where(taught_MK, scores.loss, 0.0)))


def _places(targets_M: jax.Array, valid_MK: jax.Array, n: int) -> jax.Array:
    """int32 [M, K]: i * K + k of the index i that predicts each target at step k; n * K where invalid."""
    K = valid_MK.shape[1]
    place_MK = drafting_index(targets_M, K) * K + jnp.arange(K, dtype=targets_M.dtype)[None]
    return jnp.where(valid_MK, place_MK, n * K)


def _total(x: jax.Array) -> jax.Array:
    """Sums over all but the last axis, [K]."""
    return x.astype(jnp.float32).reshape(-1, x.shape[-1]).sum(0)


def index_sums(
    valid_BTK: jax.Array,
    right_BTK: jax.Array,
    alpha_BTK: jax.Array,
    counted_BT: jax.Array,
    segments_BT: jax.Array,
    answer_tokens: int | None = None,
    drawn_BTK: jax.Array | None = None,
) -> Sums:
    """The sums of what index i drafts at step k: bool `valid`, bool `right`, float32 `alpha` and `drawn`."""
    # What step k is worth depends on all steps before it at the same index.
    whole, good = (jnp.cumprod(x.astype(jnp.int32), axis=-1) > 0 for x in (valid_BTK, right_BTK))
    before = jnp.concatenate([jnp.ones_like(good[..., :1]), good[..., :-1]], axis=-1)
    begins, drafts = answers(counted_BT, segments_BT, answer_tokens)
    drawn_BTK = jnp.zeros_like(alpha_BTK) if drawn_BTK is None else drawn_BTK
    accepted = jnp.stack([right_BTK.astype(jnp.float32), alpha_BTK, drawn_BTK])
    walks = jax.vmap(walk, (0, None, None))(accepted, begins, drafts)  # all in one loop over all positions
    greedy, sampled, drawn = (jax.tree.map(lambda x, way=way: x[way], walks) for way in range(3))
    return Sums(
        counted=_total(valid_BTK),
        correct=_total(right_BTK),
        alpha=_total(alpha_BTK),
        chains=_total(whole),
        chains_right=_total(good),
        chains_open=_total(whole & before),
        greedy=greedy,
        sampled=sampled,
        drawn=drawn,
    )


def add(a: Sums | None, b: Sums) -> Sums:
    """Sums of two parts, in float64: a float32 no longer counts by ones beyond 16.7 million."""
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), b)
    return new if a is None else jax.tree.map(np.add, a, new)


def shares(parts: np.ndarray, of: np.ndarray) -> list[float]:
    """parts / of, 0 where there is nothing to share."""
    return (np.asarray(parts) / np.maximum(of, 1)).tolist()


def summarise(sums: Sums) -> dict[str, Any]:
    """The metrics by name: lists of K, and numbers."""
    found = {
        "acc": shares(sums.correct, sums.counted),
        "cond_acc": shares(sums.chains_right, sums.chains_open),
        "full_acc": shares(sums.chains_right, sums.chains),
        "alpha": shares(sums.alpha, sums.counted),
        "loss": shares(sums.loss, sums.covered),
        "coverage": shares(sums.covered, sums.counted)[0],
        "own_text": shares(sums.own_text, sums.counted[0]),
        "counted": int(sums.counted[0]),
        "drafts": int(sums.greedy.drafts[-1]),
    }
    for way, walked in (("greedy", sums.greedy), ("sampled", sums.sampled), ("drawn", sums.drawn)):
        by_k = lengths(walked)
        found |= {
            f"length_{way}": by_k[-1],
            f"length_{way}_by_k": by_k,
            f"accepted_{way}": by_position(walked),
        }
    return found


def better(found: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """Whether an evaluation beats the best one so far, by its walked greedy length; a tie does not.

    Where nothing is measured (no held-out rows) the later one is the better one.
    """
    return best is None or LENGTH not in found or found[LENGTH] > best[LENGTH]
