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
    values_BK, ids_BK = _candidates(sampling, logits_BV)
    drawn_B = draw(values_BK, seeds_B, numbers_B)
    return drawn_B if ids_BK is None else jnp.take_along_axis(ids_BK, drawn_B[:, None], -1)[:, 0]


def probabilities(sampling: Sampling, logits_BV: jax.Array) -> jax.Array:
    """float32 [B, V]: what `choose` draws from."""
    if sampling.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits_BV, -1), logits_BV.shape[-1], dtype=jnp.float32)
    values_BK, ids_BK = _candidates(sampling, logits_BV)
    p_BK = jax.nn.softmax(values_BK, -1)
    if ids_BK is None:
        return p_BK
    rows_B1 = jnp.arange(len(ids_BK), dtype=jnp.int32)[:, None]
    return jnp.zeros(logits_BV.shape, jnp.float32).at[rows_B1, ids_BK].set(p_BK)


def tempered(sampling: Sampling, logits: jax.Array) -> jax.Array:
    """Logits [..., V] by the temperature, the largest 0: however low it is, none is infinite but -inf."""
    return (logits - logits.max(-1, keepdims=True)) / sampling.temperature


def draw(logits_BK: jax.Array, seeds_B: jax.Array, numbers_B: jax.Array, use: int = 0) -> jax.Array:
    """int32 [B], from the softmax of logits. Draws for another `use` are independent ones."""

    def one(logits_K: jax.Array, seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.categorical(_key(seed, number, use), logits_K)

    return jax.vmap(one)(logits_BK, seeds_B, numbers_B).astype(jnp.int32)


def uniform(seeds_B: jax.Array, numbers_B: jax.Array, use: int) -> jax.Array:
    """float32 [B] in [0, 1)."""
    return jax.vmap(lambda seed, number: jax.random.uniform(_key(seed, number, use)))(seeds_B, numbers_B)


def _candidates(sampling: Sampling, logits_BV: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(logits, -inf of those that are left out; their tokens, None if they are all, in order)."""
    logits_BV = tempered(sampling, logits_BV)
    V = logits_BV.shape[-1]
    if sampling.top_p in (None, 1.0) and (sampling.top_k or V) >= V:
        return logits_BV, None
    values_BK, ids_BK = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
    if sampling.top_p is not None:
        p_BK = jax.nn.softmax(values_BK, -1)
        # By what stands before it, so that the likeliest token always stays.
        values_BK = jnp.where(jnp.cumsum(p_BK, -1) - p_BK < sampling.top_p, values_BK, -jnp.inf)
    return values_BK, ids_BK


def _key(seed: jax.Array, number: jax.Array, use: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.fold_in(key, use) if use else key
