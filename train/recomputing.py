"""What keeps little for its backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.attention import KEPT


def recomputing(fn: Callable, needed: jax.Array) -> Callable:
    """`fn` under jax.checkpoint, which keeps the results of its matmuls and of attention and no more.

    The gradient is zero unless the bool [] `needed`. That makes the backward pass a branch of a conditional,
    which XLA schedules as a whole. Without it XLA computes what was not kept early, for all steps at once: on
    CPU the temporaries of `make bench`'s step are then 1.16 GB in place of 0.35.
    """
    kept = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    )
    fn = jax.checkpoint(fn, policy=kept)
    alone = jax.custom_vjp(fn)

    def backward(pullback: Callable, cotangents: Any) -> Any:
        shapes = jax.eval_shape(pullback, cotangents)
        return jax.lax.cond(
            needed,
            pullback,
            lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            cotangents,
        )

    alone.defvjp(lambda *args: jax.vjp(fn, *args), backward)
    return alone
