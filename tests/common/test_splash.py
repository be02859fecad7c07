"""The TPU's attention kernels, run step by step on the CPU, are the formula, in both directions."""

import pytest

from common import splash
from tests.common.plain_attention import require_formula

SHAPES = [
    (130, 4, 2, 64, 64, {}),  # rows and heads that are no multiples of the kernels' lanes
    (256, 4, 4, 128, 128, {"window": 40, "sinks": True}),
    (256, 4, 1, 192, 128, {}),  # keys wider than values
]


@pytest.mark.parametrize(("T", "N", "J", "d", "e", "options"), SHAPES)
def test_the_kernels_are_the_plain_formula(T, N, J, d, e, options):
    require_formula(splash, T, N, J, d, e, options, interpret=True)
