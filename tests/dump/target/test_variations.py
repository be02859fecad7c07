"""Every variation of every family gives what transformers gives: aux states, last state and logits."""

import numpy as np
import pytest

from common import safetensors
from tests.dump.target.quantised import folders
from tests.dump.target.test_parity import TOLERANCE, check, run
from tests.dump.target.variations import VARIATIONS, chosen, config
from tests.goldens import golden

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def computed():
    pytest.importorskip("torch", reason="compares with transformers' own models, which need torch")
    from tests.goldens.make import computed

    return computed


# Where a change of transformers' weights by 1e-7 changes its own result by 1e-4: small values are normed.
TOLERANCES = {"qwen3_next": 5e-4}
CASES = [(family, names) for family in VARIATIONS for names in chosen(family)]


@pytest.mark.parametrize(("family", "names"), CASES, ids=["-".join((f, *names)) for f, names in CASES])
def test_a_variation_equals_transformers(family, names, computed, tmp_path):
    made = computed(family, config(family, *names), golden.read(family).tokens)
    found = run(made, golden.write_folder(made, tmp_path), 1, 1)
    print(f"{family} {' '.join(names)}: {error(found, made):.1e}")
    check(found, made, TOLERANCES.get(family, TOLERANCE))


def error(found: dict, made: golden.Golden) -> float:
    """The largest difference of the packed row, over the root of the mean square."""
    total = len(made.tokens)
    pairs = [(np.asarray(found[key])[0, :total], expected) for key, expected in made.expected.items()]
    return max(float(np.abs(a - b).max() / np.sqrt(np.mean(b**2))) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "scheme", "experts", "tp"),
    [
        ("llama", "fbgemm", None, 2),
        ("qwen2", "ct_block", None, 1),
        ("qwen3", "ct_channel", None, 2),
        ("qwen3_moe", "modelopt", "ffn", 2),
        ("qwen3_moe", "ct_tensor", "expert", 2),
        ("qwen3_next", "block", "ffn", 1),
        ("deepseek_v2", "whole", None, 1),
        ("deepseek_v3", "block", "ffn", 2),
        ("glm4_moe", "ct_channel", "expert", 2),
        ("minimax_m2", "whole", "expert", 2),
    ],
)
def test_a_quantised_model_equals_transformers(family, scheme, experts, tp, computed, tmp_path):
    """transformers is given what NumPy made of stored values and scales; ours reads the quantised folder."""
    quantised, plain = folders(family, scheme, tmp_path)
    opened = safetensors.Checkpoint.open(plain)
    weights = {name: opened.read(name) for name in opened.tensors}
    made = computed(family, golden.config(family), golden.read(family).tokens, weights)
    found = run(made, quantised, 1, tp, experts)
    print(f"{family} {scheme}: {error(found, made):.1e}")
    check(found, made, TOLERANCES.get(family, TOLERANCE))
