"""What is drawn follows the distribution that was asked for, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipelines.decoding.sampling import Sampling, choose, probabilities

P = np.array([0.4, 0.05, 0.3, 0.05, 0.2])  # of a tiny vocabulary
DRAWS = 20_000


def drawn(sampling, seeds, numbers):
    logits = jnp.asarray(np.tile(np.log(P), (len(seeds), 1)), jnp.float32)
    return np.asarray(jax.jit(choose, static_argnums=0)(sampling, logits, jnp.asarray(seeds), numbers))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), P),
        (Sampling(0.5), P**2),
        (Sampling(1.0, top_k=2), P * (P > 0.25)),
        (Sampling(1.0, top_p=0.75), P * (P > 0.1)),
        (Sampling(1.0, top_p=0.65), P * (P > 0.25)),
        (Sampling(1.0, top_p=0.01), P * (P > 0.35)),
        (Sampling(2.0, top_p=0.9, top_k=3), P**0.5 * (P > 0.1)),
        (Sampling(0.0), P > 0.35),
    ],
)
def test_tokens_follow_the_distribution(sampling, expected):
    seeds = np.arange(DRAWS, dtype=np.int32)
    found = np.bincount(drawn(sampling, seeds, jnp.full(DRAWS, 3, jnp.int32)), minlength=len(P)) / DRAWS
    expected = expected / expected.sum()
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 4 * spread).all(), found
    told = np.asarray(probabilities(sampling, jnp.asarray(np.log(P), jnp.float32)[None]))[0]
    np.testing.assert_allclose(told, expected, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"top_k": 3}])
@pytest.mark.parametrize("temperature", [1e-6, 2.0**-126, 3e38])
def test_the_lowest_temperature_is_greedy_and_the_highest_even(temperature, how):
    """Whatever a configuration lets pass."""
    logits = jnp.asarray([[-1e4, 3.0, 5.0, 1e4], [2.0, 1e4, 9e3, 0.0]], jnp.float32)
    told = np.asarray(probabilities(Sampling(temperature, **how), logits))
    np.testing.assert_allclose(told.sum(-1), 1, rtol=1e-6)
    if temperature < 1:
        np.testing.assert_array_equal(told.argmax(-1), [3, 1])
        np.testing.assert_array_equal(told.max(-1), 1)
    else:
        np.testing.assert_allclose(told[told > 0], told.max(), rtol=1e-6)


def test_a_draw_is_of_its_seed_and_number_alone():
    seeds, numbers = np.array([5, 9, 5, 9], np.int32), jnp.arange(4, dtype=jnp.int32)
    together = drawn(Sampling(1.0), np.repeat(seeds, 8), jnp.repeat(numbers, 8))
    alone = [drawn(Sampling(1.0), seeds[i : i + 1], numbers[i : i + 1])[0] for i in range(4)]
    np.testing.assert_array_equal(together, np.repeat(alone, 8))
    many = drawn(Sampling(1.0), np.full(50, 5, np.int32), jnp.arange(50, dtype=jnp.int32))
    assert len(set(many.tolist())) > 2, "another number is another draw"
