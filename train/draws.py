"""What is drawn in a training step: a key for each of its rows, and noise on their aux states.

The noise is there so that a head does not come to lean on their last digits.

Dimensions: B rows, T positions, A aux states, H hidden size.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from train.batch import Batch

_STREAM = 0x6E6F6973  # apart from what else a seed is for


def with_draws(batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
    """The batch with a key for each row, of the seed, the step and the row of the store alone: whatever is
    drawn by it depends neither on where the row lies in the batch, nor on which chip."""

    def draws(row_B: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(row_B)

    return batch._replace(draws=_lying(draws, batch.row)(batch.row, seed, step))


def noised(amount: float, batch: Batch) -> Batch:
    """The batch, which has draws, with every value of its aux states times 1 + amount * N(0, 1).

    The noise is a share of each value, because dimensions differ in size by thousands.
    """
    if not amount:
        return batch
    apply = _lying(partial(_noised, amount), batch.aux_hidden)
    return batch._replace(aux_hidden=apply(batch.aux_hidden, batch.draws))


def _noised(amount: float, aux_BTAH: jax.Array, draws_B2: jax.Array) -> jax.Array:
    def draw(key_data: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), _STREAM)
        return jax.random.normal(key, aux_BTAH.shape[1:])

    return (aux_BTAH.astype(jnp.float32) * (1 + amount * jax.vmap(draw)(draws_B2))).astype(aux_BTAH.dtype)


def _lying(fn: Callable, like: jax.Array) -> Callable:
    """`fn`, whose result lies as `like` does."""
    where = jax.typeof(like).sharding
    return fn if where.mesh.empty else jax.sharding.auto_axes(fn, out_sharding=where)
