"""The TPU's attention kernels, run step by step on the CPU, are the formula, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import splash
from tests.common.plain_attention import plain

SHAPES = [
    (130, 4, 2, 64, 64, {}),  # rows and heads that are no multiples of the kernels' lanes
    (256, 4, 4, 128, 128, {"window": 40, "sinks": True}),
    (256, 4, 1, 192, 128, {"softcap": 3.0}),  # keys wider than values
]


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_the_kernels_are_the_plain_formula(T, N, J, d, e, options):
    """Gradients of the output and of the logsumexp together; the second row ends in padding."""
    rng = np.random.default_rng(0)
    shapes = (2, T, N, d), (2, T, J, d), (2, T, J, e), (2, T, N, e)
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    g_lse = jnp.asarray(rng.normal(size=(2, T, N)), jnp.float32)
    segments = np.sort(rng.integers(1, 4, (2, T)), 1).astype(np.int32)
    segments[1, -9:] = 0
    window, softcap = options.get("window"), options.get("softcap")
    sinks = jnp.asarray(rng.normal(size=N), jnp.bfloat16) if options.get("sinks") else None
    form = d**-0.5, window

    out, lse = splash.attend(q, k, v, segments, *form, sinks, softcap, return_lse=True, interpret=True)
    shift = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - g_lse
    back = splash.pull_back(q, k, v, segments, lse, g, shift, *form, softcap, interpret=True)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wide = None if sinks is None else sinks.astype(jnp.float32)
    expected, pull = jax.vjp(lambda *x: plain(*x, segments, *form, wide, softcap), *exact)
    pulled = pull((g.astype(jnp.float32), g_lse))
    for value, wanted in zip((out, lse, *back), (*expected, *pulled), strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        assert np.abs(value - wanted).max() < 0.02 * np.abs(wanted).max()
