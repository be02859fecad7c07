"""Functions that keep little for their backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.attention import KEPT


def light(fn: Callable, needed: jax.Array) -> Callable:
    """`fn`, keeping its matmuls' results and attention for the backward pass, which is zeros unless `needed`.

    The backward pass is a branch of a conditional, which XLA schedules as a whole. Otherwise it would compute
    what was not kept early, for all steps at once (for CPU it drops jax.checkpoint's barriers).
    """
    kept = jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    )
    fn = jax.checkpoint(fn, policy=kept)
    light = jax.custom_vjp(fn)

    def backward(pullback: Callable, cotangents: Any) -> Any:
        shapes = jax.eval_shape(pullback, cotangents)
        return jax.lax.cond(
            needed,
            pullback,
            lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            cotangents,
        )

    light.defvjp(lambda *args: jax.vjp(fn, *args), backward)
    return light
