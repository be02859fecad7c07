"""What of a draft is accepted, so that answers are those of the target alone.

Where drafts are the head's likeliest tokens, the target chooses at every node as if there were none, and the
draft is followed as far as it says the same: with the same seeds a drafted answer is the plain one. A token
that was drawn from q is accepted with min(1, p / q), and else replaced by a draw from max(p - q, 0): so it
follows the target's p whatever q is (arXiv 2211.17192).

Dimensions: B sequences, n nodes, k steps, d = k + 1 tokens that are given at most, V the target's vocabulary,
D the draft's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pipelines.decoding.drafting import ACCEPTED, REPLACED, Draft
from pipelines.decoding.sampling import Sampling, choose, draw, probabilities, uniform


class Given(NamedTuple):
    """The next `counts` tokens of each sequence: accepted drafts, and one by the target. `nodes`, ascending:
    those that they follow. What lies behind the count means nothing."""

    tokens_Bd: jax.Array
    nodes_Bd: jax.Array
    counts_B: jax.Array


def follow(
    sampling: Sampling,
    draft: Draft,
    steps: int,
    logits_BnV: jax.Array,
    seeds_B: jax.Array,
    numbers_B: jax.Array,
) -> Given:
    """From a draft of likeliest tokens; `numbers` are those of the next tokens in their answers."""
    (B, n), V = draft.tokens_Bn.shape, logits_BnV.shape[-1]
    numbers_Bn = numbers_B[:, None] + draft.depths_Bn
    seeds_Bn = jnp.broadcast_to(seeds_B[:, None], (B, n))
    wanted = choose(sampling, logits_BnV.reshape(-1, V), seeds_Bn.reshape(-1), numbers_Bn.reshape(-1))
    wanted_Bn, is_draft_1n = wanted.reshape(B, n), (jnp.arange(n) > 0)[None]

    def down(carry, _):
        node_B1, goes_on_B = carry
        says = draft.tokens_Bn == jnp.take_along_axis(wanted_Bn, node_B1, 1)
        fits_Bn = says & (draft.parents_Bn == node_B1) & is_draft_1n & goes_on_B[:, None]
        goes_on_B = fits_Bn.any(-1)
        found_B1 = jnp.argmax(fits_Bn, -1).astype(jnp.int32)[:, None]
        node_B1 = jnp.where(goes_on_B[:, None], found_B1, node_B1)
        return (node_B1, goes_on_B), (node_B1[:, 0], goes_on_B)

    root_B1 = jnp.zeros((B, 1), jnp.int32)
    _, (nodes_kB, accepted_kB) = jax.lax.scan(down, (root_B1, jnp.ones(B, bool)), None, length=steps)
    nodes_Bd = jnp.concatenate([root_B1, nodes_kB.T], 1)
    return Given(
        jnp.take_along_axis(wanted_Bn, nodes_Bd, 1), nodes_Bd, 1 + accepted_kB.sum(0, dtype=jnp.int32)
    )


def accept(
    sampling: Sampling,
    draft: Draft,
    ids_D: jax.Array,
    logits_BnV: jax.Array,
    seeds_B: jax.Array,
    numbers_B: jax.Array,
) -> Given:
    """From a chain of drawn tokens."""
    (B, n), V = draft.tokens_Bn.shape, logits_BnV.shape[-1]
    p_BnV = probabilities(sampling, logits_BnV.reshape(-1, V)).reshape(B, n, V)
    q_BkD, drafts_Bk = jax.nn.softmax(draft.logits_BkD, -1), draft.tokens_Bn[:, 1:]
    q_BkV = jnp.zeros((B, n - 1, V)).at[..., ids_D].set(q_BkD)
    p_Bk, q_Bk = (jnp.take_along_axis(x, drafts_Bk[..., None], 2)[..., 0] for x in (p_BnV[:, :-1], q_BkV))
    numbers_Bk = numbers_B[:, None] + jnp.arange(n - 1, dtype=jnp.int32)[None]
    seeds_Bk = jnp.broadcast_to(seeds_B[:, None], (B, n - 1))
    u_Bk = uniform(seeds_Bk.reshape(-1), numbers_Bk.reshape(-1), ACCEPTED).reshape(B, n - 1)
    accepted_B = jnp.cumprod((u_Bk * q_Bk < p_Bk).astype(jnp.int32), 1).sum(1, dtype=jnp.int32)
    # Behind the last draft q is 0, and the target's own distribution is left.
    q_BnV = jnp.concatenate([q_BkV, jnp.zeros((B, 1, V))], 1)
    left_BV = jnp.take_along_axis(jnp.maximum(p_BnV - q_BnV, 0.0), accepted_B[:, None, None], 1)[:, 0]
    target_B = draw(jnp.log(left_BV), seeds_B, numbers_B + accepted_B, REPLACED)
    nodes_Bn = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (B, n))
    tokens_Bn = jnp.concatenate([drafts_Bk, target_B[:, None]], 1)
    tokens_Bn = jnp.where(nodes_Bn < accepted_B[:, None], tokens_Bn, target_B[:, None])
    return Given(tokens_Bn, nodes_Bn, 1 + accepted_B)
