"""Which token comes next: the likeliest, or one that is drawn.

What is drawn is a function of the distribution, the answer's seed and the token's number in it: the answers
that are computed beside it have no part in that.

Dimensions: B answers, V vocabulary, K candidates.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0: the likeliest token. `top_k`, then `top_p`: only the likeliest so many, and of those
    the fewest that have this mass together; None: all."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None


def choose(sampling: Sampling, logits_BV: jax.Array, seeds_B: jax.Array, numbers_B: jax.Array) -> jax.Array:
    """int32 [B]: the `numbers`-th token of each answer, from float32 logits. Seeds are int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    V = logits_BV.shape[-1]
    if sampling.top_p in (None, 1.0) and (sampling.top_k or V) >= V:
        return _drawn(logits_BV, seeds_B, numbers_B)
    values_BK, ids_BK = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p is not None:
        p_BK = jax.nn.softmax(values_BK, -1)
        # By what stands before it, so that the likeliest token always stays.
        values_BK = jnp.where(jnp.cumsum(p_BK, -1) - p_BK < sampling.top_p, values_BK, -jnp.inf)
    drawn_B = _drawn(values_BK, seeds_B, numbers_B)
    return jnp.take_along_axis(ids_BK, drawn_B[:, None], -1)[:, 0]


def _drawn(logits_BK: jax.Array, seeds_B: jax.Array, numbers_B: jax.Array) -> jax.Array:
    def one(logits_K: jax.Array, seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), number), logits_K)

    return jax.vmap(one)(logits_BK, seeds_B, numbers_B).astype(jnp.int32)
