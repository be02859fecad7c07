"""Noise on the aux states, so that a head does not come to lean on their last digits.

Dimensions: B rows, T positions, A aux states, H hidden size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from train.batch import Batch

_STREAM = 0x6E6F6973  # apart from what else a seed is for


def noised(amount: float, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
    """The batch with every value of its aux states times 1 + amount * N(0, 1).

    The noise is a share of each value, because dimensions differ in size by thousands. It depends on seed,
    step and the row of the store alone: not on where the row lies in the batch, nor on which chip.
    """
    if not amount:
        return batch
    apply = partial(_noised, amount)
    where = jax.typeof(batch.aux_hidden).sharding
    if not where.mesh.empty:
        apply = jax.sharding.auto_axes(apply, out_sharding=where)
    return batch._replace(aux_hidden=apply(batch.aux_hidden, batch.row, seed, step))


def _noised(
    amount: float, aux_BTAH: jax.Array, row_B: jax.Array, seed: jax.Array, step: jax.Array
) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)
    draw = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), aux_BTAH.shape[1:]))
    return (aux_BTAH.astype(jnp.float32) * (1 + amount * draw(row_B))).astype(aux_BTAH.dtype)
