"""Losses and scores of a chunk: ties, rounded teachers, and any function of logits and teacher as a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.layers import einsum
from train import loss
from train.loss import Taught, Teacher, cross_entropy, is_right, score, weighted_loss

M, K, H, D, COUNT = 32, 2, 6, 9, 27


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 16)


def made(seed=0, rounding=0.0):
    """(z, lm_head, weights, a teacher whose logits are `rounding` away from those of its logsumexp)."""
    rng = np.random.default_rng(seed)
    z, w, weight, logits = (rng.normal(size=s) for s in ((M, K, H), (D, H), (M, K), (M, D)))
    lse = np.log(np.exp(logits).sum(-1))
    taught = Teacher(
        None, None, jnp.asarray(logits + rounding, jnp.float32), jnp.asarray(lse, jnp.float32),
        jnp.asarray(logits.argmax(-1), jnp.int32),
    )  # fmt: skip
    return *(jnp.asarray(x, jnp.float32) for x in (z, w, weight)), taught


def test_the_first_of_equal_logits_is_the_heads_choice():
    logits = jnp.zeros((4, 1, D)).at[3].set(jnp.nan)
    right = is_right(logits, jnp.asarray([0, 1, -1, 0], jnp.int32))
    np.testing.assert_array_equal(right[:, 0], [True, False, False, False])
    one = jnp.asarray([[[1.0, 3.0, 2.0, 3.0]]])
    assert [bool(is_right(one, jnp.asarray([v], jnp.int32))[0, 0]) for v in range(4)] == [0, 1, 0, 0]


def test_a_dead_head_is_right_as_often_as_the_first_token_is():
    z, w, _, taught = made()
    found = score(z, 0 * w, taught, jnp.int32(M))
    np.testing.assert_array_equal(found.correct[:, 0], np.asarray(taught.argmax_M) == 0)


def test_a_rounded_teacher_has_no_more_than_all_of_the_mass():
    z, w, _, taught = made(rounding=0.6)  # exp(0.6) = 1.8 of the mass
    alpha = np.asarray(score(z, w, taught, jnp.int32(M)).alpha)
    exact = np.asarray(score(z, w, made()[3], jnp.int32(M)).alpha)
    np.testing.assert_allclose(alpha, exact, rtol=1e-5)
    assert (alpha <= 1 + 1e-6).all()


def hard_labels(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """Another loss than the project's own: cross entropy with the target's argmax."""
    logp = jax.nn.log_softmax(logits_cKD, -1)
    return -jnp.take_along_axis(logp, taught.argmax_c[:, None, None], -1)[..., 0]


@pytest.mark.parametrize("fn", [cross_entropy, hard_labels])
def test_chunks_give_the_loss_and_the_gradients_of_all_at_once(fn):
    z, w, weight, taught = made()
    weight = weight * (np.arange(M) < COUNT)[:, None].astype(np.float32)

    def in_chunks(z, w):
        return weighted_loss(fn, z, w, weight, taught, jnp.int32(COUNT))[0]

    def at_once(z, w):
        p = jax.nn.softmax(taught.logits_MD, -1)
        per = fn(einsum("mkh,dh->mkd", z, w), Taught(p, jnp.ones(M), taught.argmax_M))
        return (per * weight).sum()

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(in_chunks, (0, 1))(z, w)),
        jax.tree.leaves(jax.value_and_grad(at_once, (0, 1))(z, w)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_capacity_that_chunks_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 24)
    with pytest.raises(AssertionError, match="24"):
        score(*made()[:2], made()[3], jnp.int32(M))
