"""Acceptance as a server counts it: every answer is walked through, from draft to draft.

An average over all positions is not what a server reaches: it drafts again only behind what it accepted, so
positions that are hard to predict, where drafts end, are begun from more often than others. The walk of an
answer x[s..e-1]:

- The target reads the prompt and gives the answer's first token x[s] itself. The first draft stands at index
  s-1, the last one with a hidden state, takes x[s] as its token and proposes x[s+1], x[s+2], ... (index s
  where a document begins with its answer).
- A draft of k tokens at index i, of which the first m are accepted, gives m + 1 tokens, for the target adds
  one of its own. The next draft stands at index i + m + 1. A last draft stands where x[e-1] is next.
- acceptance length = tokens a draft = 1 + accepted / drafts: what vLLM reports. The first token of an answer
  belongs to no draft.

Step p at index i is accepted with probability a[i, p]. At temperature 0 that is 1 where the draft's token is
the target's argmax, else 0, and the walk is a server's own, exactly, where the text is the target's greedy
output. On other text a draft counts as accepted where it says what the target would have said, and the walk
goes on along the text. At temperature 1 a[i, p] = sum_v min(p_v, q_v) (arXiv 2211.17192), draws are taken as
independent, and the walk is followed in expectation: with v[i] the probability that a draft stands at i,

    v[i + m + 1] += v[i] * a[i, 0] * ... * a[i, m-1] * (1 - a[i, m]),   a[i, k] = 0,
    length = 1 + sum_i v[i] * sum_p a[i, 0] * ... * a[i, p] / sum_i v[i].

Where the target drew the answer at temperature 1, more is known: the token v that it drew at step p, and that
a[i, p] = min(1, q_v / p_v) is the probability that this was the draft's. Given the answer, such draws are
independent indeed, and the expectation is exact. Of greedy answers neither is: what a server reads at
temperature 1 is other text (figures: the README of speculate).

Dimensions: B rows, T positions, K steps; k = 1..K tokens drafted at once, all of them walked together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Walk(NamedTuple):
    """Sums over all answers, which add up: entry k-1 is of drafting k tokens at once."""

    drafts: Any  # [K]
    accepted: Any  # [K, K]: by position in the draft; 0 from position k on


def answers(
    counted_BT: jax.Array, segments_BT: jax.Array, answer_tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """(bool [B, T] where an answer's first draft stands, bool [B, T] where a draft may stand at all).

    `counted_BT` marks the positions whose next token belongs to an answer of the same document
    (`train.targets.counted_targets`). Drafts stand in the first `answer_tokens` tokens of an answer.
    """
    inside = counted_BT[:, 1:] & counted_BT[:, :-1] & (segments_BT[:, 1:] == segments_BT[:, :-1])
    edge = jnp.zeros_like(counted_BT[:, :1])
    begins = counted_BT & ~jnp.concatenate([edge, inside], 1)
    drafts = jnp.concatenate([inside, edge], 1)
    if answer_tokens is not None:
        index = jnp.arange(counted_BT.shape[1], dtype=jnp.int32)[None]
        first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
        drafts &= index - first + 2 <= answer_tokens  # the draft's first token is that many into the answer
    return begins, drafts


def walk(accept_BTK: jax.Array, begins_BT: jax.Array, drafts_BT: jax.Array) -> Walk:
    """The sums of all answers. `accept_BTK` float32: a[i, p], 0 where step p leaves the answer."""
    B, _, K = accept_BTK.shape
    drafted, ones = jnp.tri(K, dtype=jnp.float32), jnp.ones((K, B, 1), jnp.float32)  # drafted [k-1, p]: p < k

    def position(carry, now):
        ahead_kBS, sums = carry  # the probability that a draft stands 0..K positions further on
        accept_BK, begins_B, drafts_B = now
        here_kB = jnp.where(begins_B[None], 1.0, ahead_kBS[..., 0]) * drafts_B[None]
        run_kBK = jnp.cumprod(accept_BK[None] * drafted[:, None], -1)
        exactly_kBS = jnp.concatenate([ones, run_kBK], -1) - jnp.concatenate([run_kBK, 0 * ones], -1)
        ahead_kBS = jnp.concatenate([ahead_kBS[..., 1:], 0 * ones], -1) + here_kB[..., None] * exactly_kBS
        accepted_kK = (here_kB[..., None] * run_kBK).sum(1)
        return (ahead_kBS, Walk(sums.drafts + here_kB.sum(1), sums.accepted + accepted_kK)), None

    none = jnp.zeros((K, B, K + 1), jnp.float32), Walk(*(jnp.zeros((K, *n)) for n in ((), (K,))))
    by_position = (jnp.moveaxis(accept_BTK, 1, 0), begins_BT.T, drafts_BT.T.astype(jnp.float32))
    return jax.lax.scan(position, none, by_position)[0][1]


def by_position(found: Walk) -> list[float]:
    """Accepted a draft at every position of a draft of K tokens: what vLLM reports by position."""
    return (np.asarray(found.accepted)[-1] / np.maximum(np.asarray(found.drafts)[-1], 1e-9)).tolist()


def lengths(found: Walk) -> list[float]:
    """The acceptance length of drafting k = 1..K tokens at once; 1 where there is no draft."""
    return (1 + np.asarray(found.accepted).sum(1) / np.maximum(np.asarray(found.drafts), 1e-9)).tolist()
