"""The real TPU compiler, which needs no TPU: layers cost what they need, and recipes fit their slices.

FLOPs and bytes are the compiler's, for one chip; a loop's body is counted once.
"""

import importlib.util

import pytest

from dump.target.deltakernel import CYCLES
from pipelines.bench import tpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, the extra `tpu`"
    ),
]
HBM = tpu.CHIPS["v6e"].hbm_gib


def compiled(*args: object) -> dict[str, float]:
    """What tests/tpu.py prints, from a process of its own."""
    found = tpu.alone(["tests.tpu", *map(str, args)])
    print(args, found)
    return found


@pytest.mark.parametrize(
    ("recipe", "split", "dp", "tp"),
    [
        ("qwen3-30b-a3b", "ffn", 8, 1),
        ("glm-4.7-flash", "ffn", 8, 1),
        ("qwen3-next-80b-a3b", "ffn", 16, 1),
        ("qwen3-30b-a3b", "ffn", 2, 4),
        ("qwen3-30b-a3b", "expert", 2, 4),
        ("qwen3-next-80b-a3b", "expert", 1, 16),
    ],
)
def test_a_layer_of_experts_costs_its_active_ones(recipe, split, dp, tp):
    found = compiled("moe", recipe, split, dp, tp)
    assert found["flops"] <= 1.3 * found["active"]


def test_the_kernel_of_deltanet_is_priced_by_its_instructions():
    found = compiled("delta", "qwen3-next-80b-a3b")["cycles"]
    assert 0.8 * CYCLES <= found <= CYCLES


@pytest.mark.parametrize("recipe", ["qwen3-32b", "llama-3.1-8b"])
def test_a_dense_layer_costs_its_matrices(recipe):
    found = compiled("layer", recipe)
    assert found["least"] <= found["flops"] <= 1.1 * found["least"]


@pytest.mark.parametrize(
    ("recipe", "length"),
    [
        ("qwen3-32b", 2048),
        ("qwen3-32b", 32_768),
        ("llama-3.1-8b", 32_768),
        ("qwen3-30b-a3b", 2048),
        ("glm-4.7-flash", 2048),
    ],
)
def test_a_batch_fits_its_slice(recipe, length):
    found = compiled("prefill", recipe, length)
    assert found["arguments_gib"] + found["temporaries_gib"] + found["outputs_gib"] < 0.9 * HBM


@pytest.mark.parametrize(
    "of", [("qwen3-32b",), ("qwen3-32b", 16_384), ("qwen3-32b", 32_768, 4), ("deepseek-v3",)]
)
def test_training_fits_a_v6e_4(of):
    found = compiled("train", *of)
    assert found["arguments_gib"] + found["temporaries_gib"] < HBM


def test_the_system_of_a_fitted_start_leaves_most_of_the_memory_to_the_sample():
    found = compiled("fit", "qwen3-32b")
    assert found["arguments_gib"] + found["temporaries_gib"] + found["outputs_gib"] < 0.3 * HBM
