"""The benchmark compares like with like: the same loss, and no more FLOPs than are needed."""

import jax
import numpy as np
import pytest

from pipelines.bench import training
from pipelines.bench.matmuls import matmuls

SIZE = training.Size(2, 32, 2, hidden=32, heads=4, kv_heads=2, ffn=48, draft=96, vocabulary=120)


@pytest.fixture(scope="module")
def steps():
    problem = training.make_problem(SIZE)
    return problem, *training.compile_steps(problem)


def test_the_plain_step_ends_with_the_same_loss_and_weights(steps):
    _, (ours, arguments, _), (theirs, plain_arguments, _) = steps
    (state, metrics), (plain_state, plain_metrics) = ours(*arguments), theirs(*plain_arguments)
    np.testing.assert_allclose(metrics.loss, plain_metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.gradient_norm, plain_metrics.gradient_norm, rtol=1e-5)
    first = optimizer_moment(state), optimizer_moment(plain_state)
    for name, moment in first[0].items():
        np.testing.assert_allclose(moment, first[1][name], rtol=1e-3, atol=1e-7, err_msg=name)


def optimizer_moment(state):
    """Adam's first moment after one step: the gradient, scaled."""
    (found,) = (
        x.mu for x in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")
    )
    return found


def test_the_least_flops_are_below_those_of_the_plain_step_but_not_far(steps):
    """XLA counts what the plain step does: all pairs of positions, causal or not, and every logit."""
    problem, _, (theirs, _, _) = steps
    assert 0.5 < problem.flops / theirs.cost_analysis()["flops"] < 1


def test_the_step_multiplies_little_more_than_it_has_to(steps):
    """What XLA counts of the plain step, which has no loops, is what is counted here."""
    problem, (ours, _, _), (theirs, _, _) = steps
    plain = sum(found.flops for found in matmuls(theirs.as_text()))
    assert 0.8 < plain / theirs.cost_analysis()["flops"] <= 1
    assert 1 <= training.matmul_flops(problem, ours) / problem.flops < 2
