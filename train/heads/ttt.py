"""One scanned step for all K of a rollout, whose keys and values every later step sees.

Autodiff of `jax.lax.scan` would keep the whole buffer of keys and values for each of the K steps. Here each
step masks what lies behind it, so that the full buffer of the last step serves them all on the way back.

Dimensions: K steps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Step(NamedTuple):
    """Pure functions of (places, step int32 [], shared, state). `make` gives the arrays that the step adds
    to the buffer. `advance`, which gets the buffer [K, ...] as well, gives the new state; it may read nothing
    in it that is of a later step. Of what all steps read, `shared` has a gradient and `places` has none."""

    make: Callable[[Tree, jax.Array, Tree, jax.Array], Tree]
    advance: Callable[[Tree, jax.Array, Tree, jax.Array, Tree], jax.Array]
    kept: tuple[str, ...] = ()  # names of what is kept for the backward pass; the rest is computed again


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def rolled(step: Step, steps: range, places: Tree, shared: Tree, state: jax.Array) -> jax.Array:
    """The states [K, ...] after each of these steps; differentiable in `shared` and `state`. The buffer is of
    all steps from 0 on, zeros for those before the first."""
    return _forward(step, steps, places, shared, state)[0]


def _forward(step: Step, steps: range, places: Tree, shared: Tree, state: jax.Array):
    kept = jax.checkpoint_policies.save_only_these_names(*step.kept)
    make, advance = (jax.checkpoint(fn, policy=kept) for fn in (step.make, step.advance))

    def body(carry, k):
        state, seen = carry
        made, of_make = jax.vjp(make, places, k, shared, state)
        seen = jax.tree.map(lambda x, all_K: jax.lax.dynamic_update_index_in_dim(all_K, x, k, 0), made, seen)
        state, of_advance = jax.vjp(advance, places, k, shared, state, seen)
        for pullback in (of_make, of_advance):
            pullback.args_res = None  # `_backward` has them
        return (state, seen), (state, of_make, of_advance)

    first = jnp.int32(steps.start)
    made = jax.eval_shape(step.make, places, first, shared, state)
    seen = jax.tree.map(lambda x: jnp.zeros((steps.stop, *x.shape), x.dtype), made)
    (_, seen), (states, *pullbacks) = jax.lax.scan(body, (state, seen), _numbers(steps))
    return states, (places, shared, state, states, seen, pullbacks)


def _backward(step: Step, steps: range, saved: Tree, d_states: jax.Array):
    places, shared, first, states, seen, pullbacks = saved

    def body(carry, given):
        d_shared, d_state, d_seen = carry
        k, d_out, (of_make, of_advance) = given
        state = jnp.where(k > steps.start, states[k - 1 - steps.start], first)
        of_make.args_res = [places, k, shared, state]
        of_advance.args_res = [places, k, shared, state, seen]
        _, _, of_shared, of_state, of_seen = of_advance(d_state + d_out)
        d_seen = _sum(d_seen, of_seen)
        _, _, more_shared, more_state = of_make(jax.tree.map(lambda x: x[k], d_seen))
        return (_sum(d_shared, of_shared, more_shared), of_state + more_state, d_seen), None

    zeros = jax.tree.map(jnp.zeros_like, (shared, first, seen))
    given = _numbers(steps), d_states, pullbacks
    (d_shared, d_state, _), _ = jax.lax.scan(body, zeros, given, reverse=True)
    return None, d_shared, d_state


def _numbers(steps: range) -> jax.Array:
    return jnp.arange(steps.start, steps.stop, dtype=jnp.int32)


def _sum(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *trees)


rolled.defvjp(_forward, _backward)
