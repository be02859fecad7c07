"""A system that is solved block by block has the solution of all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import cholesky


@pytest.mark.parametrize("unknowns", [5, 16, 37])
def test_it_is_the_solution_whatever_the_blocks(unknowns, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 8)
    rng = np.random.default_rng(unknowns)
    half, wanted = rng.normal(size=(unknowns, 2 * unknowns)), rng.normal(size=(unknowns, 3))
    matrix = half @ half.T / unknowns + 0.1 * np.eye(unknowns)
    found = cholesky.solve(jnp.asarray(matrix, jnp.float32), jnp.asarray(wanted, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.solve(matrix, wanted), rtol=1e-4, atol=1e-4)


def test_of_a_matrix_that_is_not_positive_definite_nothing_is_told(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 8)
    matrix = jnp.eye(20, dtype=jnp.float32).at[13, 13].set(-1.0)
    assert bool(jnp.isnan(cholesky.solve(matrix, jnp.ones((20, 1), jnp.float32))).any())


def test_it_takes_little_more_memory_than_the_system(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 64)
    matrix, wanted = (jax.ShapeDtypeStruct((640, n), jnp.float32) for n in (640, 160))
    held = jax.jit(lambda *given: cholesky.solve(*given)).lower(matrix, wanted).compile().memory_analysis()
    assert held.temp_size_in_bytes < 4 * 4 * 640 * 800
