"""The TPU's attention kernel, run step by step on the CPU, gives what the blockwise path gives."""

import jax.numpy as jnp
import numpy as np
import pytest

from common import splash
from common.attention import attend


@pytest.mark.parametrize(
    ("T", "N", "J", "d", "e", "options"),
    [
        (130, 4, 2, 64, 64, {}),  # rows and heads that are no multiples of the kernel's lanes
        (256, 4, 4, 128, 128, {"window": 40, "sinks_N": True}),
        (256, 4, 1, 192, 128, {"softcap": 30.0}),  # keys wider than values
    ],
)
def test_the_kernel_gives_what_blocks_give(T, N, J, d, e, options):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, z)), jnp.bfloat16) for n, z in ((N, d), (J, d), (J, e)))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, T)), 1), jnp.int32)
    if "sinks_N" in options:
        options = options | {"sinks_N": jnp.asarray(rng.normal(size=N), jnp.bfloat16)}
    arguments = q, k, v, segments, d**-0.5
    found = splash.attend(*arguments, **options, return_lse=True, interpret=True)
    expected = attend(*arguments, **options, return_lse=True)
    for value, wanted in zip(found, expected, strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        np.testing.assert_allclose(value, wanted, atol=0.02)
