"""RoPE frequencies against formulas written out by hand; the goldens compare them with transformers."""

import math

import numpy as np
import pytest

from common.errors import EyasError
from common.layers import apply_rope, rope_tables
from common.rope import inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_default_and_linear():
    plain, factor = inverse_frequencies(8, 10000.0)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    scaled, _ = inverse_frequencies(8, 10000.0, {"type": "linear", "factor": 4.0})
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)
    assert factor == 1.0


def test_llama3_without_a_blend_between_its_bounds_is_refused():
    with pytest.raises(EyasError, match="low_freq_factor below high_freq_factor"):
        inverse_frequencies(128, 500000.0, LLAMA3 | {"high_freq_factor": 1.0})


def test_llama3_keeps_short_waves_and_divides_long_ones():
    plain, _ = inverse_frequencies(128, 500000.0)
    scaled, _ = inverse_frequencies(128, 500000.0, LLAMA3)
    waves = 2 * math.pi / plain
    short, long = waves < 8192 / 4, waves > 8192
    assert short.sum() > 0
    assert long.sum() > 0
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert np.all((scaled[between] <= plain[between]) & (scaled[between] >= plain[between] / 8))


def test_yarn_attention_factor():
    yarn = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    assert inverse_frequencies(64, 10000.0, yarn)[1] == pytest.approx(0.1 * math.log(40) + 1)
    same = yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert inverse_frequencies(64, 10000.0, same)[1] == pytest.approx(1.0)
    scaled, _ = inverse_frequencies(64, 10000.0, yarn)
    plain, _ = inverse_frequencies(64, 10000.0)
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 40)


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "llama3", "factor": 8.0}, "high_freq_factor"),
        (LLAMA3 | {"surprise": 1}, "surprise"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(scaling, word):
    with pytest.raises(EyasError, match=word):
        inverse_frequencies(64, 10000.0, scaling)


def test_rotation_depends_on_distance_alone():
    inverse, _ = inverse_frequencies(8, 100.0)
    x = np.random.RandomState(0).standard_normal((2, 1, 2, 1, 12)).astype(np.float32)

    def product(i, j, interleaved):
        q, k = (
            apply_rope(x[n], rope_tables(np.array([[p, p + 1]], np.int32), inverse), interleaved)[0, 0, 0]
            for n, p in ((0, i), (1, j))
        )
        return float(q @ k)

    for interleaved in (False, True):
        assert product(3, 1, interleaved) == pytest.approx(product(40, 38, interleaved), rel=1e-4)
        assert product(3, 1, interleaved) != pytest.approx(product(3, 2, interleaved), rel=1e-3)
