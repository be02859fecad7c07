"""Losses and scores of a chunk: ties, rounded teachers, and any function of logits and teacher as a loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.layers import einsum
from train import loss, losses
from train.config import LOSSES, TrainConfig
from train.loss import Reads, Teacher, is_right, weighted_loss
from train.losses import Taught

M, K, H, D, COUNT = 32, 2, 6, 9, 27


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 16)


def by_step(z_MKH):
    """(the states as a rollout gives them, [K, M, H], and who reads them)."""
    M, K, _ = z_MKH.shape
    m, k = np.arange(M, dtype=np.int32), np.arange(K, dtype=np.int32)
    return z_MKH.swapaxes(0, 1), Reads(jnp.asarray(m[:, None] + M * k), jnp.asarray(M * k[:, None] + m))


def score(z, *args):
    return loss.score(*by_step(z), *args)


def made(seed=0, rounding=0.0):
    """(z, lm_head, weights, a teacher whose log-probabilities are `rounding` too large)."""
    rng = np.random.default_rng(seed)
    z, w, weight, logits = (rng.normal(size=s) for s in ((M, K, H), (D, H), (M, K), (M, D)))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) + rounding
    argmax = jnp.asarray(logits.argmax(-1), jnp.int32)
    taught = Teacher(argmax, logp_MD=jnp.asarray(logp, jnp.float32))
    return *(jnp.asarray(x, jnp.float32) for x in (z, w, weight)), taught


def test_the_first_of_equal_logits_is_the_heads_choice():
    logits = jnp.zeros((1, 4, D)).at[0, 3].set(jnp.nan)
    right = is_right(logits, jnp.asarray([0, 1, -1, 0], jnp.int32))
    np.testing.assert_array_equal(right[0], [True, False, False, False])
    one = jnp.asarray([[[1.0, 3.0, 2.0, 3.0]]])
    assert [bool(is_right(one, jnp.asarray([v], jnp.int32))[0, 0]) for v in range(4)] == [0, 1, 0, 0]


def test_a_dead_head_is_right_as_often_as_the_first_token_is():
    z, w, _, taught = made()
    found = score(z, 0 * w, taught, jnp.int32(M))
    np.testing.assert_array_equal(found.correct[:, 0], np.asarray(taught.argmax_M) == 0)


def test_what_the_target_drew_is_accepted_as_often_as_anything_is():
    """In the mean over its draws: sum_v p_v min(1, q_v / p_v) = sum_v min(p_v, q_v)."""
    z, w, _, taught = made()
    p, total = jnp.exp(taught.logp_MD), 0.0
    for token in range(D):
        drawn = score(z, w, taught, jnp.int32(M), jnp.full(M, token, jnp.int32)).drawn
        total += np.asarray(p[:, token, None] * drawn)
    np.testing.assert_allclose(total, score(z, w, taught, jnp.int32(M)).alpha, rtol=1e-5)
    lacking = score(z, w, taught, jnp.int32(M), jnp.full(M, -1, jnp.int32)).drawn
    assert not lacking.any()


def test_a_rounded_teacher_has_no_more_than_all_of_the_mass():
    z, w, _, taught = made(rounding=0.6)  # exp(0.6) = 1.8 of the mass
    alpha = np.asarray(score(z, w, taught, jnp.int32(M)).alpha)
    exact = np.asarray(score(z, w, made()[3], jnp.int32(M)).alpha)
    np.testing.assert_allclose(alpha, exact, rtol=1e-5)
    assert (alpha <= 1 + 1e-6).all()


def float64(name, logits, p, mass, argmax, scale=0.7, decay=2.0):
    """The formulas of train/losses.py a second time, of one target: logits [D], p [D] renormalised."""
    logq = logits - np.log(np.exp(logits).sum())
    q = np.exp(logq)
    ce, alpha = -(p * logq).sum(), np.minimum(mass * p, q).sum()
    weight = scale * np.exp(-decay * alpha)
    return {
        "cross-entropy": ce,
        "hard-labels": -logq[argmax],
        "forward-kl": (p * (np.log(p) - logq)).sum(),
        "reverse-kl": (q * (logq - np.log(p))).sum(),
        "lk-alpha": -np.log(alpha),
        "lk-lambda": weight * ce + (1 - weight) * (1 - alpha),
    }[name]


def frozen_weight(logits, p, mass, argmax, at):
    """lk-lambda whose weight is that of the logits `at`, as its derivative takes it."""
    q = np.exp(at - np.log(np.exp(at).sum()))
    weight = 0.7 * np.exp(-2.0 * np.minimum(mass * p, q).sum())
    ce, alpha = (float64(n, logits, p, mass, argmax) for n in ("cross-entropy", "lk-alpha"))
    return weight * ce + (1 - weight) * (1 - np.exp(-alpha))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_and_its_derivative_the_numerical_one(name, temperature):
    rng = np.random.default_rng(7)
    logits, t, mass, argmax = rng.normal(size=D), 2 * rng.normal(size=D), 0.8, 4
    logp = t - np.log(np.exp(t).sum())
    tempered = np.exp(t / temperature) / np.exp(t / temperature).sum()
    taught = Taught(
        jnp.asarray(logp, jnp.float32)[None, None], jnp.full(1, mass, jnp.float32), jnp.full(1, argmax)
    )
    fn = losses.make(name, 0.7, 2.0, temperature)
    found, gradient = jax.value_and_grad(lambda x: fn(x[None, None], taught)[0, 0])(
        jnp.asarray(logits, jnp.float32)
    )

    def value(x):
        if name == "lk-lambda":
            return frozen_weight(x, tempered, mass, argmax, logits)
        return float64(name, x, tempered, mass, argmax)

    np.testing.assert_allclose(found, value(logits), rtol=1e-5, atol=1e-6)
    steps = 1e-6 * np.eye(D)
    expected = [(value(logits + step) - value(logits - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_that_is_sure_of_another_token_learns_what_float64_says(name):
    """Whose logits differ from the target's by more than a float32 holds of probabilities."""
    rng = np.random.default_rng(3)
    logits, t = 100 * np.eye(D)[1] + rng.normal(size=D), 90 * np.eye(D)[4] + rng.normal(size=D)
    p = np.exp(t) / np.exp(t).sum()
    taught = Taught(jnp.asarray(np.log(p), jnp.float32)[None, None], jnp.ones(1), jnp.full(1, 4))
    fn = losses.make(name, 0.7, 2.0)
    found, gradient = jax.value_and_grad(lambda x: fn(x[None, None], taught)[0, 0])(
        jnp.asarray(logits, jnp.float32)
    )

    def value(x):
        return frozen_weight(x, p, 1.0, 4, logits) if name == "lk-lambda" else float64(name, x, p, 1.0, 4)

    steps = 1e-4 * np.eye(D)
    expected = [(value(logits + step) - value(logits - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(found, value(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-5)
    # Of reverse KL a head that is sure of one token learns nothing, whatever that costs.
    assert (np.abs(expected).max() > 1e-3) == (name != "reverse-kl")


def total(fn, z, *args):
    return weighted_loss(fn, *by_step(z), *args)[0]


@pytest.mark.parametrize("name", ["cross-entropy", "lk-lambda"])
def test_chunks_give_the_loss_and_the_gradients_of_all_at_once(name):
    z, w, weight, taught = made()
    weight = weight * (np.arange(M) < COUNT)[:, None].astype(np.float32)
    fn = losses.make(name)

    def in_chunks(z, w):
        return total(fn, z, w, weight, taught, jnp.int32(COUNT))

    def at_once(z, w):
        logp = jax.nn.log_softmax(taught.logp_MD, -1)[None]
        per = fn(einsum("mkh,dh->kmd", z, w), Taught(logp, jnp.ones(M), taught.argmax_M))
        return (per.T * weight).sum()

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(in_chunks, (0, 1))(z, w)),
        jax.tree.leaves(jax.value_and_grad(at_once, (0, 1))(z, w)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def top(taught, k):
    """The same teacher, of which the `k` likeliest tokens are known; every third token is not the draft's."""
    values, ids = jax.lax.top_k(taught.logp_MD, k)
    index = jnp.where(ids % 3 == 2, -1, ids // 3 * 2 + ids % 3)
    return Teacher(index[:, 0], top_Mk=values, top_index_Mk=index)


@pytest.mark.parametrize("name", ["cross-entropy", "reverse-kl", "lk-alpha"])
def test_what_the_largest_logits_lack_counts_as_one_token(name):
    """The loss's gradient is that over the known tokens of the draft and one that stands for all others."""
    z, w, _, whole = made()
    w, taught, fn = w[: D - D // 3], top(whole, 3), losses.make(name)
    ones = jnp.ones((M, K), jnp.float32)
    found = jax.jit(jax.grad(lambda z: total(fn, z, w, ones, taught, jnp.int32(M))))(z)

    @jax.jit
    @jax.grad
    def lumped(z, top, index):
        known = jnp.where(index >= 0, 1.0, 0.0)
        q, p = jax.nn.softmax(w @ z)[index] * known, jnp.exp(top)
        rest_p, rest_q = 1 - p.sum(keepdims=True), 1 - q.sum(keepdims=True)
        p, q = jnp.append(p * known, rest_p), jnp.append(q, rest_q)
        logits, logp = (jnp.where(p > 0, jnp.log(jnp.where(p > 0, x, 1.0)), -30.0) for x in (q, p / p.sum()))
        return fn(logits[None, None], Taught(logp[None, None], p.sum(keepdims=True), index[:1] * 0))[0, 0]

    for m, step in ((0, 0), (5, 1), (17, 0)):
        expected = lumped(z[m, step], taught.top_Mk[m], taught.top_index_Mk[m])
        np.testing.assert_allclose(found[m, step], expected, rtol=2e-3, atol=2e-5, err_msg=str(m))


def test_a_teacher_of_all_logits_is_the_whole_teacher():
    z, w, _, whole = made()
    values, ids = jax.lax.top_k(whole.logp_MD, D)
    taught = Teacher(whole.argmax_M, top_Mk=values, top_index_Mk=ids)
    for found, expected in zip(
        score(z, w, taught, jnp.int32(M)), score(z, w, whole, jnp.int32(M)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_memory_is_bounded_by_a_chunk_whatever_the_number_of_targets():
    wide = 4096  # the draft vocabulary

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def temporaries(targets):
        argmax = array(targets, dtype=jnp.int32)
        taught = Teacher(argmax, array(targets, H), array(wide, H), array(targets))
        fn = jax.value_and_grad(partial(total, losses.make("lk-lambda")), (0, 1))
        args = (array(targets, K, H), array(wide, H), array(targets, K), taught, array(dtype=jnp.int32))
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(512) - temporaries(32) < 512 * wide * 4 / 4  # a quarter of one [targets, wide]


def test_options_that_would_do_nothing_are_refused():
    for changed, match in (
        ({"teacher_temperature": 2.0, "loss": "lk-alpha"}, "does not go with loss=lk-alpha"),
        ({"teacher_temperature": 2.0, "loss": "hard-labels"}, "does not go with loss=hard-labels"),
        ({"lk_decay": 1.0}, "lk_decay=1.0 has no meaning with loss=cross-entropy"),
        ({"loss": "soft"}, "use one of cross-entropy, hard-labels"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(store="s", out="o", **changed)
    TrainConfig(store="s", out="o", loss="lk-lambda", lk_scale=0.5, lk_decay=1.0)
    TrainConfig(store="s", out="o", loss="reverse-kl", teacher_temperature=2.0)


def test_a_capacity_that_chunks_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 24)
    with pytest.raises(AssertionError, match="12"):
        score(*made()[:2], made()[3], jnp.int32(M))
