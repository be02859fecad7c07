"""The GPU's attention kernels, run step by step on the CPU, are the formula, in both directions; and Triton's
compiler is given a program that it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import flash
from tests.common.plain_attention import plain

SHAPES = [
    (130, 2, 1, 64, 64, {}),  # rows that are no multiples of the kernels' blocks
    (300, 1, 1, 80, 80, {"window": 40, "sinks": True}),  # heads that are no power of two
    (256, 4, 2, 192, 128, {"softcap": 3.0}),  # keys wider than values
]


def made(T, N, J, d, e, options):
    """(arrays, cotangents of output and logsumexp, form, sinks, softcap); the second row ends in padding."""
    rng = np.random.default_rng(0)
    shapes = (2, T, N, d), (2, T, J, d), (2, T, J, e), (2, T, N, e)
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    g_lse = jnp.asarray(rng.normal(size=(2, T, N)), jnp.float32)
    segments = np.sort(rng.integers(1, 4, (2, T)), 1).astype(np.int32)
    segments[1, -9:] = 0
    sinks = jnp.asarray(rng.normal(size=N), jnp.bfloat16) if options.get("sinks") else None
    return (q, k, v, segments), (g, g_lse), (d**-0.5, options.get("window")), sinks, options.get("softcap")


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_the_kernels_are_the_plain_formula(T, N, J, d, e, options):
    (q, k, v, segments), (g, g_lse), form, sinks, softcap = made(T, N, J, d, e, options)
    alone = jax.default_backend() != "gpu"  # on a GPU, as it computes
    out, lse = flash.attend(q, k, v, segments, *form, sinks, softcap, return_lse=True, interpret=alone)
    shift = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - g_lse
    back = flash.pull_back(q, k, v, segments, lse, g, shift, *form, softcap, interpret=alone)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wide = None if sinks is None else sinks.astype(jnp.float32)
    expected, pull = jax.vjp(lambda *x: plain(*x, segments, *form, wide, softcap), *exact)
    pulled = pull((g.astype(jnp.float32), g_lse))
    for value, wanted in zip((out, lse, *back), (*expected, *pulled), strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        assert np.abs(value - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_a_program_for_gpus_is_made_of_the_kernels(T, N, J, d, e, options):
    """Also where no GPU is: lowering turns kernels into Triton's own language, with its rules of shapes."""
    arrays, (g, _), form, sinks, softcap = made(T, N, J, d, e, options)
    lse = jnp.zeros((2, T, N))
    forward = jax.jit(lambda *x: flash.attend(*x, *form, sinks, softcap, return_lse=True))
    back = jax.jit(lambda *x: flash.pull_back(*x, *form, softcap))
    for step, given, count in ((forward, arrays, 1), (back, (*arrays, lse, g, lse), 2)):
        text = step.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @__gpu$xla.gpu.triton") == count
