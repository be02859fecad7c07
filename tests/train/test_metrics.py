"""Metrics and the meshed steps against the float64 reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import attention
from common.mesh import make_mesh
from tests.train.on_device import STEPS, on_mesh
from tests.train.problem import head_config, problem
from train import loss, optimizer
from train.batch import Batch
from train.draws import noised, with_draws
from train.metrics import add, better, summarise
from train.step import State, gradient, score_step, train_step
from train.targets import counted_targets

CONFIG = head_config()
DECAY = 0.8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 16)
    monkeypatch.setattr(attention, "BLOCK", 16)


@pytest.mark.parametrize("chips", [1, 2])
def test_metrics_are_the_references(chips):
    p, mesh = problem(), make_mesh(chips)
    score = jax.jit(score_step(CONFIG, mesh, STEPS, jnp.float32))
    found, expected = summarise(add(None, score(*on_mesh(p, mesh)))), p.metrics(STEPS)
    by_position = ("acc", "cond_acc", "full_acc", "alpha", "coverage")
    walked = [
        f"{name}_{way}{k}"
        for way in ("greedy", "sampled")
        for name, k in (("length", "_by_k"), ("accepted", ""))
    ]
    for name in (*by_position, *walked):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
    assert found["drafts"] == expected["drafts_greedy"]
    assert found["length_greedy"] == found["length_greedy_by_k"][-1] > 1.1
    np.testing.assert_allclose(found["loss"], p.losses(STEPS).steps, rtol=1e-5)
    assert found["counted"] == expected["counted"][0]
    own = [
        p.tokens[b, j + 1] == p.target_logits[b, j].argmax()
        for b, j in np.argwhere(counted_targets(p.segments, p.mask))
        if j > 0 and p.segments[b, j] == p.segments[b, j - 1]  # there is an index that drafts it
    ]
    assert found["own_text"] == pytest.approx(np.mean(own))
    assert 0 < found["full_acc"][-1] < found["acc"][-1] < 1  # the figures could have differed


def test_sums_of_batches_add_up_to_the_sums_of_all():
    p, mesh = problem(B=4), make_mesh()
    score = jax.jit(score_step(CONFIG, mesh, STEPS, jnp.float32))
    params, frozen, batch = on_mesh(p, mesh)
    once = add(None, score(params, frozen, batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, 2 * y), add(once, once), once)


@pytest.mark.parametrize(("chips", "compat"), [(1, None), (2, "specforge")])
def test_a_step_minimises_the_references_loss_on_any_mesh(chips, compat):
    """Plain SGD, so that the step shows the gradient itself; every chip holds other rows."""
    p, mesh = problem(), make_mesh(chips)
    params, frozen, batch = on_mesh(p, mesh, compat)
    gradients = gradient(CONFIG, mesh, STEPS, DECAY, jnp.float32, compat)
    sgd = optax.sgd(1e-4)
    state = State(params, sgd.init(params), jnp.int32(0))
    new, metrics = jax.jit(train_step(gradients, sgd))(state, frozen, batch)
    expected = p.losses(STEPS, compat=compat)
    np.testing.assert_allclose(metrics.loss, expected.total, rtol=1e-5)
    np.testing.assert_allclose(metrics.loss_K, expected.steps, rtol=1e-5)
    moved = {n: np.asarray(x, np.float64) - p.params[n] for n, x in new.params.items()}
    # First order: the loss falls by |gradient|^2 * rate.
    after = p.losses(STEPS, {n: p.params[n] + x for n, x in moved.items()}, compat).total
    fall = float(metrics.gradient_norm) ** 2 * 1e-4
    np.testing.assert_allclose(expected.total - after, fall, rtol=0.02)
    assert int(new.step) == 1


@pytest.mark.slow
def test_parts_of_a_batch_give_its_gradients():
    """Divided by what counts in all parts, whose numbers differ, on a chip or on two."""
    p, found = problem(B=4, T=24), {}
    for chips, parts in ((1, 1), (2, 2)):
        mesh = make_mesh(chips)
        params, frozen, batch = on_mesh(p, mesh, parts=parts)
        assert len(set(np.asarray(batch.count).tolist())) == len(batch.count)
        fn = jax.jit(gradient(CONFIG, mesh, STEPS, DECAY, jnp.float32))
        found[chips, parts] = jax.device_get(fn(params, frozen, batch))
    for other in found.values():
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(found[1, 1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_noise_is_a_function_of_seed_step_and_row():
    rng = np.random.default_rng(0)
    aux = np.repeat(rng.normal(size=(1, 5, 3, 4)), 3, 0).astype(np.float32) * np.float32(100)
    names = dict.fromkeys(Batch._fields)
    batch = Batch(**names | {"aux_hidden": jnp.asarray(aux), "row": jnp.asarray([7, 2, 7], jnp.int32)})

    @partial(jax.jit, static_argnums=0)
    def noisy(amount, seed, step):
        return noised(amount, with_draws(batch, seed, step)).aux_hidden

    found = np.asarray(noisy(0.1, 0, 3))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found, noisy(0.1, 0, 3))
    for other in (found[1], noisy(0.1, 0, 4)[0], noisy(0.1, 1, 3)[0]):
        assert (found[0] != np.asarray(other)).all()
    assert np.std(found / aux - 1) == pytest.approx(0.1, rel=0.3)
    np.testing.assert_array_equal(noisy(0.0, 0, 3), aux)


def test_warm_up_starts_above_zero_and_the_cosine_ends_at_zero():
    rate = optimizer.schedule(1e-3, warmup=0.1, steps=100)
    rates = np.array([float(rate(step)) for step in range(101)])
    assert 0 < rates[0] < rates[9] < 1e-3 == pytest.approx(rates[10])
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert float(optimizer.schedule(1e-3, 0.02, 1)(0)) > 0


def test_weight_decay_spares_norms():
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    made = optimizer.make(optax.constant_schedule(0.1), 1.0, (0.9, 0.999), 0.5)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = made.update(jax.tree.map(jnp.zeros_like, params), made.init(params), params)
    assert (updates["w"] < 0).all()
    assert (updates["norm"] == 0).all()


def test_a_better_head_accepts_more_and_an_equal_one_is_not_better():
    assert better({"length_greedy": 1.2}, None)
    assert better({"length_greedy": 1.3}, {"length_greedy": 1.2})
    assert not better({"length_greedy": 1.2}, {"length_greedy": 1.2})
    assert better({"step": 3}, {"step": 2})  # nothing is measured: the later one


def test_the_norm_that_is_logged_is_the_one_that_is_clipped():
    """Dividing by the units of the inputs comes first, and then the limit."""
    params, units = {"fc": jnp.ones((2, 3)), "norm": jnp.ones(2)}, jnp.array([0.1, 1.0, 10.0])
    gradients = {"fc": jnp.arange(6.0).reshape(2, 3), "norm": jnp.ones(2)}
    seen = np.sqrt(((np.arange(6).reshape(2, 3) / np.asarray(units)) ** 2).sum() + 2)
    moves = {}
    for limit in (0.5, 2 * seen):
        made = optimizer.make(optax.constant_schedule(0.1), limit, (0.0, 0.0), 0.0, {"fc": units})
        state = State(params, made.init(params), jnp.int32(0))
        found = train_step(lambda *_: ((jnp.float32(1), jnp.zeros(1), jnp.zeros(1)), gradients), made)
        new, metrics = found(state, None, None)
        np.testing.assert_allclose(metrics.gradient_norm, seen, rtol=1e-6)
        moves[limit] = optax.tree.get(new.optimizer, "mu")
    np.testing.assert_allclose(optax.tree.norm(moves[0.5]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(moves[2 * seen]), seen, rtol=1e-6)
