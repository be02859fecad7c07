"""A head drafts: a chain of tokens, or a tree of which each level's best branches grow on.

The tree is EAGLE-2's (arXiv 2406.16858, section 4), as SGLang's --speculative-num-steps, -eagle-topk and
-num-draft-tokens choose it: at each level the `topk` best leaves get `topk` children each, by the product of
the head's probabilities along the branch; of all nodes that were met, the best `nodes` - 1 are the draft. A
chain is the tree of topk 1, plain decoding that without any.

Dimensions: B sequences, n nodes (the root among them), K = topk, D draft vocabulary, V the target's, P nodes
that were met, M = (steps - 1) K places of the head's cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.cached_attention import New, Tree
from common.layers import einsum
from pipelines.decoding.sampling import Sampling, draw, tempered
from train.heads.head import Head

DRAFTED, ACCEPTED, REPLACED = 1, 2, 3  # uses of random numbers, see sampling.draw


@dataclass(frozen=True)
class Drafting:
    """How a head drafts; a chain has steps + 1 nodes. `sampled`: its tokens are drawn from the head's
    distribution, and not the likeliest ones; of a chain only."""

    head: Head
    steps: int
    nodes: int
    topk: int = 1
    sampled: bool = False

    @property
    def places(self) -> int:
        """Of the head's cache, behind a sequence."""
        return max(self.steps + 1, self.branching)

    @property
    def branching(self) -> int:
        """Places of those that grow on; at least one, so that arrays are not empty."""
        return max(1, self.topk * (self.steps - 1))


class Drafter(NamedTuple):
    """What a head drafts with."""

    ready: Any
    output_DH: jax.Array
    ids_D: jax.Array  # int32, target ids


class Last(NamedTuple):
    """Of each sequence [B]: its last token, the position of that, the answer's seed and the next one's number
    there; and the states [B, H] that the head left at the index before, to its next step and its output."""

    token: jax.Array
    start: jax.Array
    seed: jax.Array
    number: jax.Array
    state: jax.Array
    hidden: jax.Array


class Draft(NamedTuple):
    """Nodes in the order of their levels; the first one is the root, the last token of the sequence."""

    tokens_Bn: jax.Array  # target ids
    parents_Bn: jax.Array
    depths_Bn: jax.Array
    logits_BkD: jax.Array | None = None  # those that sampled drafts were drawn from

    def tree(self, starts_B: jax.Array, steps: int) -> Tree:
        """As the target's attention takes it."""
        B, n = self.tokens_Bn.shape
        own = jnp.broadcast_to(jnp.eye(n, dtype=bool), (B, n, n))

        def up(_: int, sees_Bnn: jax.Array) -> jax.Array:
            return own | jnp.take_along_axis(sees_Bnn, self.parents_Bn[..., None], 1)

        return Tree(starts_B, self.depths_Bn, jax.lax.fori_loop(0, steps, up, own))


class _Met(NamedTuple):
    """Nodes that were met: their scores, their tokens in the draft vocabulary, and the nodes before them, -1
    for the root."""

    scores: jax.Array
    tokens: jax.Array
    parents: jax.Array


def undrafted(tokens_B: jax.Array) -> Draft:
    """The last tokens alone: plain decoding."""
    zeros = jnp.zeros_like(tokens_B)[:, None]
    return Draft(tokens_B[:, None], zeros, zeros)


def draft(
    d: Drafting, sampling: Sampling, drafter: Drafter, embed_VH: jax.Array, cache: Any, last: Last
) -> tuple[Draft, Any]:
    """(draft, the head's cache)."""
    (B, H), K, places = last.state.shape, d.topk, d.branching
    children = partial(_children, d, sampling, drafter, last)
    root = jnp.full((B, 1), -1, jnp.int32)
    all_BdH = d.head.at_once(drafter.ready, cache, (last.state, last.hidden), last.start, d.steps, embed_VH)
    begins_BH = last.hidden if all_BdH is None else all_BdH[:, 0]
    first, logits = children(begins_BH[:, None], jnp.zeros((B, 1)), root, 0)
    depths_BM = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32) // K, (B, places))

    def level(carry, depth: jax.Array):
        """The nodes of one depth are read, and the best of their children are the next ones."""
        cache, states, tokens, scores, nodes, sees = carry
        own_K = depth * K + jnp.arange(K, dtype=jnp.int32)
        sees = sees | (own_K[:, None] == jnp.arange(places, dtype=jnp.int32)[None])[None]
        positions_BK = jnp.broadcast_to((last.start + depth)[:, None], (B, K))
        new = New(positions_BK, last.start[:, None] + own_K[None], Tree(last.start, depths_BM, sees))
        if all_BdH is None:
            embedded = embed_VH[drafter.ids_D[tokens]].astype(states.dtype)
            states, hidden, cache = d.head.step(drafter.ready, cache, embedded, states, new)
        else:
            hidden = jnp.broadcast_to(all_BdH[:, depth + 1][:, None], (B, K, all_BdH.shape[-1]))
        found, logits = children(hidden, scores, nodes, depth + 1)
        scores, best = jax.lax.top_k(found.scores, K)
        states, sees = (jnp.take_along_axis(x, best[..., None] // K, 1) for x in (states, sees))
        tokens, nodes = jnp.take_along_axis(found.tokens, best, 1), K + depth * K * K + best
        return (cache, states, tokens, scores, nodes, sees), (found, logits)

    nodes = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (B, K))
    states = jnp.broadcast_to(last.state[:, None], (B, K, H))
    carry = cache, states, first.tokens, first.scores, nodes, jnp.zeros((B, K, places), bool)
    (cache, *_), later = jax.lax.scan(level, carry, jnp.arange(d.steps - 1, dtype=jnp.int32))
    met, logits = jax.tree.map(_behind, (first, logits), later)
    return _best(d, drafter, last.token, met)._replace(logits_BkD=logits), cache


def _behind(first_B: jax.Array, later_dB: jax.Array) -> jax.Array:
    """The first level's, and behind it those of the levels that were scanned."""
    later_B = jnp.moveaxis(later_dB, 0, 1)
    return jnp.concatenate([first_B, later_B.reshape(len(first_B), -1, *first_B.shape[2:])], 1)


def _children(
    d: Drafting,
    sampling: Sampling,
    drafter: Drafter,
    last: Last,
    hidden_BmH: jax.Array,
    scores_Bm: jax.Array,
    nodes_Bm: jax.Array,
    depth: Any,
) -> tuple[_Met, jax.Array | None]:
    """The K children of each of m nodes, together [B, m K], and of a sampled chain the logits [B, 1, D]."""
    logits_BmD = einsum("bmh,dh->bmd", hidden_BmH, drafter.output_DH)
    if d.sampled:
        logits_BmD = tempered(sampling, logits_BmD)
        tokens_BmK = draw(logits_BmD[:, 0], last.seed, last.number + depth, DRAFTED)[:, None, None]
        more_BmK = jnp.zeros(tokens_BmK.shape)
    else:
        values_BmK, tokens_BmK = jax.lax.top_k(logits_BmD, d.topk)
        more_BmK = values_BmK - jax.nn.logsumexp(logits_BmD, -1, keepdims=True)
    scores = scores_Bm[..., None] + jnp.minimum(more_BmK, 0.0)  # so that no child is before its parent
    parents = jnp.broadcast_to(nodes_Bm[..., None], tokens_BmK.shape)
    found = _Met(*(x.reshape(len(x), -1) for x in (scores, tokens_BmK, parents)))
    return found, logits_BmD if d.sampled else None


def _best(d: Drafting, drafter: Drafter, token_B: jax.Array, met: _Met) -> Draft:
    """The best nodes with the root in front, numbered anew: parents before their children."""
    _, chosen_Bm = jax.lax.top_k(met.scores, d.nodes - 1)
    chosen_Bm = jnp.sort(chosen_Bm, -1)
    tokens_Bm, parents_Bm = (jnp.take_along_axis(x, chosen_Bm, 1) for x in (met.tokens, met.parents))
    before = chosen_Bm[:, None] < parents_Bm[..., None]
    parents_Bm = jnp.where(parents_Bm < 0, 0, 1 + before.sum(-1, dtype=jnp.int32))
    depths_P = np.repeat(np.arange(d.steps), [d.topk, *[d.topk**2] * (d.steps - 1)]) + 1
    root = jnp.zeros_like(token_B)[:, None]
    return Draft(
        jnp.concatenate([token_B[:, None], drafter.ids_D[tokens_Bm]], 1),
        jnp.concatenate([root, parents_Bm], 1),
        jnp.concatenate([root, jnp.asarray(depths_P, jnp.int32)[chosen_Bm]], 1),
    )
