"""Heads by the TPU's kernel are those of the plain path."""

import jax.numpy as jnp
import numpy as np
import pytest

from common.layers import apply_rope, rms_norm, rope_tables
from dump.target.heads import by_kernel, heads_of, rotated
from dump.target.spec import Norm


def projection(dtype, size=128, heads=6, length=256):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, length, heads * size)), dtype)
    positions = jnp.asarray(random.integers(500, size=(2, length)), jnp.int32)
    return x, positions, jnp.asarray(random.normal(size=size), dtype)


@pytest.mark.parametrize(("start", "width"), [(0, 128), (0, 32), (64, 64)])
@pytest.mark.parametrize("norm", [None, Norm(1e-6), Norm(1e-5, 1.0)])
def test_the_kernel_norms_and_rotates_as_plain_code_does(start, width, norm):
    x, positions, weight = projection(jnp.bfloat16)
    tables = rope_tables(positions, np.geomspace(1, 1e-3, width // 2, dtype=np.float32))
    weights = () if norm is None else (weight,)
    found = by_kernel(128, start, norm, x, *tables, *weights, interpret=True)
    plain = heads_of(x, 128)
    if norm:
        plain = rms_norm(plain, weight, norm.eps, norm.offset)
    plain = apply_rope(plain, tables, heads=1, start=start)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (found, plain)), rtol=0.02, atol=0.02)
    same = rotated(x, 128, tables, start, norm, *weights)
    np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (same, plain)))
