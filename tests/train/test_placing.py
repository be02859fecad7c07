"""Weights and moments lie divided over the chips, before a step and after it, whatever the optimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.mesh import make_mesh, sharding
from tests.train.on_device import STEPS, on_mesh, parameters_of
from tests.train.problem import head_config, problem
from train import optimizer, placing
from train.batch import embeddings
from train.step import State, gradient, train_step

CONFIG = head_config()


def held(x):
    """How many numbers each chip holds of an array."""
    return {shard.data.size for shard in x.addressable_shards}


def ours(rate):
    """All that our optimiser can keep beside the weights."""
    muon, still = CONFIG.matrices(), frozenset({"lm_head.weight"})
    return optimizer.make(
        optax.constant_schedule(rate), 1.0, (0.9, 0.99), 0.1, muon=muon, still=still, ema=0.5
    )


@pytest.mark.slow
def test_muon_and_the_average_are_the_same_on_any_mesh():
    p, found = problem(), []
    for chips in (1, 2):
        mesh, rule = make_mesh(chips), ours(0.1)
        _, frozen, batch = on_mesh(p, mesh)
        params = parameters_of(p)
        state = State(params, rule.init(params), jnp.int32(0))
        state = jax.device_put(state, placing.along(state, p.config.parameters(), mesh))
        step = jax.jit(train_step(gradient(p.config, mesh, STEPS, 0.8, jnp.float32), rule))
        after, _ = step(state, frozen, batch)
        found.append(jax.device_get((after.params, optimizer.weights(after.optimizer, None))))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert (found[0][0]["fc.weight"] != parameters_of(p)["fc.weight"]).all()


@pytest.mark.parametrize("made", [optax.adamw, ours])
def test_a_step_leaves_weights_and_moments_where_they_lay(made):
    p, mesh = problem(), make_mesh(2)
    declared, rule = p.config.parameters(), made(1e-3)
    _, frozen, batch = on_mesh(p, mesh)
    params = parameters_of(p)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = State(params, rule.init(params), jnp.int32(0))
        state = jax.device_put(state, placing.along(state, declared, mesh))
        step = jax.jit(train_step(gradient(p.config, mesh, STEPS, 0.8, jnp.float32), rule))
        after, _ = step(state, frozen, batch)
    for tree in (state, after):
        for path, x in jax.tree_util.tree_flatten_with_path((tree.params, tree.optimizer))[0]:
            assert held(x) == {x.size // 2 if x.ndim > 1 else x.size}, path


def test_embeddings_are_found_wherever_their_columns_lie():
    p, mesh = problem(), make_mesh(2)
    _, frozen, batch = on_mesh(p, mesh)
    frozen = frozen._replace(lm_head=None)
    axes = placing.frozen_axes(frozen, mesh)
    divided = frozen._replace(embed=placing.place(np.asarray(frozen.embed), sharding(mesh, axes.embed)))
    assert held(divided.embed) == {frozen.embed.size // 2}
    specs = placing.in_specs(p.config.parameters(), frozen, mesh)[1]
    rows = sharding(mesh, ("row",)).spec
    found = jax.shard_map(embeddings, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False)
    np.testing.assert_array_equal(
        jax.jit(found)(divided, batch), p.embed.astype(np.float32)[p.tokens.reshape(-1)]
    )
