"""The real TPU compiler, which needs no TPU: experts cost what is active, and recipes fit their slices.

FLOPs and bytes are the compiler's, for one chip; a loop's body is counted once.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'eyas[tpu]'"
    ),
]
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-16", "TPU_WORKER_HOSTNAMES": "localhost"}
HBM = 31.25  # GiB of a v6e chip that programs can have


def compiled(*args: object) -> dict[str, float]:
    """What tests/tpu.py prints, from a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.tpu", *map(str, args)]
    env |= ALONE | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    print(args, done.stdout.strip())
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("recipe", "split", "dp", "tp"),
    [
        ("qwen3-30b-a3b", "ffn", 2, 4),
        ("qwen3-30b-a3b", "expert", 2, 4),
        ("qwen3-next-80b-a3b", "expert", 1, 16),
    ],
)
def test_a_layer_of_experts_costs_its_active_ones(recipe, split, dp, tp):
    found = compiled("moe", recipe, split, dp, tp)
    assert found["flops"] <= 1.3 * found["active"]


def test_qwen3_32b_fits_a_v6e_16():
    found = compiled("prefill", "qwen3-32b")
    assert found["arguments_gib"] + found["temporaries_gib"] < HBM


@pytest.mark.parametrize("recipe", ["qwen3-32b", "deepseek-v3"])
def test_training_fits_a_v6e_4(recipe):
    found = compiled("train", recipe)
    assert found["arguments_gib"] + found["temporaries_gib"] < HBM
