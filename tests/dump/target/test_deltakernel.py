"""A DeltaNet layer by the TPU's kernel is that of the plain path, and as near to the exact one."""

import jax.numpy as jnp
import numpy as np
import pytest

from dump.target.deltakernel import serves
from dump.target.deltanet import DeltaNet
from dump.target.spec import Context

D, GROUP, TAPS = 128, 2, 4


def made(T: int, key_heads: int):
    """(a layer, its weights, what its projections give, segments): documents that begin and end anywhere, and
    keys that are alike, so that the triangular systems are far from the identity."""
    random = np.random.default_rng(0)
    part = DeltaNet(64, key_heads, key_heads * GROUP, D, D, TAPS, 1e-6)
    w = {
        "conv1d": random.normal(size=((2 + GROUP) * key_heads * D, 1, TAPS)) * 0.5,
        "A_log": random.uniform(-4, 1, key_heads * GROUP),
        "dt_bias": random.normal(size=key_heads * GROUP),
        "norm": random.uniform(0.5, 2, D),
    }
    width = (2 + 2 * GROUP) * D
    mixed = random.normal(size=(2, T, key_heads, width)) + random.normal(size=(1, 1, 1, width))
    rates = random.normal(size=(2, T, key_heads, 2 * GROUP)) * 2
    cuts = [[5, 63, 64, 65, 128, 130], [T // 2 + 7]]
    segments = np.array([np.searchsorted(c, np.arange(T), "right") for c in cuts], np.int32)
    return part, w, mixed.reshape(2, T, -1), rates, segments


@pytest.mark.slow  # of which nearly all is compiling the kernel's steps for a CPU
@pytest.mark.parametrize(("T", "key_heads"), [(192, 1), (128, 2)])
def test_the_kernel_computes_what_plain_code_does(T, key_heads):
    part, w, mixed, rates, segments = made(T, key_heads)
    assert serves(jnp.asarray(mixed, jnp.bfloat16), D, D, GROUP, TAPS)
    context = Context(jnp.asarray(segments), jnp.asarray(segments), None)

    def run(way, dtype, **options):
        held = {name: jnp.asarray(x, jnp.bfloat16).astype(dtype) for name, x in w.items()}
        given = (jnp.asarray(x, jnp.bfloat16).astype(dtype) for x in (mixed, rates))
        return np.asarray(way(held, *given, context=context, **options), np.float32)

    exact = run(part.by_parts, jnp.float32)
    plain, found = run(part.by_parts, jnp.bfloat16), run(part.by_kernel, jnp.bfloat16, interpret=True)
    error, allowed = (np.square(x - exact).mean() for x in (found, plain))
    assert 0 < error <= 1.1 * allowed
    np.testing.assert_allclose(found, plain, rtol=0.05, atol=0.05)
