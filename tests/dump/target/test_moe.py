"""The kernel that multiplies rows with their experts' matrices gives what XLA gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from dump.target import moe


@pytest.mark.parametrize("sizes", [[256, 0, 100, 156], [7, 1, 0, 120], [0, 0, 0, 512]])
def test_the_kernel_equals_xla(sizes):
    random = np.random.RandomState(0)
    x_SI = jnp.asarray(random.standard_normal((512, 256)), jnp.bfloat16)
    w_EIO = jnp.asarray(random.standard_normal((len(sizes), 256, 192)), jnp.bfloat16)
    sizes_E, done = jnp.asarray(sizes, jnp.int32), sum(sizes)
    found = moe._grouped_by_kernel(x_SI, w_EIO, sizes_E, interpret=True)
    expected = moe._grouped_by_xla(x_SI, w_EIO, sizes_E)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found[:done].astype(np.float32), expected[:done].astype(np.float32), rtol=0.01, atol=0.05
    )
