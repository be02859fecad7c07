"""The GPU's attention kernels, run step by step on the CPU, are the formula, in both directions; and Triton's
compiler is given a program that it takes."""

import jax
import jax.numpy as jnp
import pytest

from common import flash
from tests.common.plain_attention import made, require_formula

SHAPES = [
    (130, 2, 1, 64, 64, {}),  # rows that are no multiples of the kernels' blocks
    (300, 1, 1, 80, 80, {"window": 40, "sinks": True}),  # heads that are no power of two
    (256, 4, 2, 192, 128, {}),  # keys wider than values
]


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_the_kernels_are_the_plain_formula(T, N, J, d, e, options):
    on_gpu = jax.default_backend() == "gpu"  # there as it computes
    require_formula(flash, T, N, J, d, e, options, interpret=not on_gpu)


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_a_program_for_gpus_is_made_of_the_kernels(T, N, J, d, e, options):
    """Also where no GPU is: lowering turns kernels into Triton's own language, with its rules of shapes."""
    arrays, (g, _), form, sinks = made(T, N, J, d, e, options)
    lse = jnp.zeros((2, T, N))
    forward = jax.jit(lambda *x: flash.attend(*x, *form, sinks, return_lse=True))
    back = jax.jit(lambda *x: flash.pull_back(*x, *form))
    for step, given, count in ((forward, arrays, 1), (back, (*arrays, lse, g, lse), 2)):
        text = step.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @__gpu$xla.gpu.triton") == count
