"""A rollout's scan is the loop over its steps that one would write down, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.heads.ttt import Step, rolled

K, C, d = 4, 5, 3


def make(offset, k, shared, state):
    return {"seen": jnp.tanh(state @ shared["w"] + (offset + k).astype(jnp.float32))}


def advance(offset, k, shared, state, seen):
    share_K = jnp.where(jnp.arange(K) <= k, 1.0 + np.arange(K, dtype=np.float32), 0.0)
    read = (seen["seen"] * share_K[:, None, None]).sum(0)
    return jnp.sin(state + read * shared["scale"]) @ shared["w"]


def loop(steps, offset, shared, state):
    """The same with a list in place of a buffer, and no mask."""
    made, states = [], []
    for k in steps:
        made.append(make(offset, jnp.int32(k), shared, state)["seen"])
        read = sum((1.0 + j) * x for j, x in enumerate(made, steps.start))
        state = jnp.sin(state + read * shared["scale"]) @ shared["w"]
        states.append(state)
    return jnp.stack(states)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = {"w": (d, d), "scale": (C, d)}
    shared = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    state, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((C, d), (K, C, d)))
    return jnp.int32(1), shared, state, weights


@pytest.mark.parametrize("steps", [range(K), range(1, K)])
def test_states_and_gradients_are_the_loops(inputs, steps):
    offset, shared, state, weights = inputs

    def through(fn):
        def loss(shared, state):
            states = fn(steps, offset, shared, state)
            return (states * weights[steps.start :]).sum(), states

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(shared, state)

    found = through(lambda *args: rolled(Step(make, advance), *args))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, through(loop))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_square_of_the_steps(inputs):
    """The buffer is there twice, as values and as gradients, however many steps see it."""
    offset, _, _, _ = inputs

    def temporaries(steps):
        def make(offset, k, shared, state):
            return state

        def advance(offset, k, shared, state, seen):
            share_K = jnp.where(jnp.arange(steps) <= k, 1.0, 0.0)
            return jnp.sin(state + jnp.einsum("k,kcd->cd", share_K, seen)) * shared

        def loss(shared, state):
            return rolled(Step(make, advance), range(steps), offset, shared, state).sum()

        x = jax.ShapeDtypeStruct((512, 16), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32) < 2.5 * temporaries(16)
