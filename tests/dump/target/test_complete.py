"""What a config.json leaves out is what transformers has in its place, in every family, for every field."""

import json
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

from common import storage
from dump import target
from dump.target.families import FAMILIES
from pipelines.bench.published import PUBLISHED
from tests.goldens import golden

CONFIGS = [golden.config(name) for name in golden.names()]
MODEL_TYPES = {config["architectures"][0]: config["model_type"] for config in CONFIGS}
NEEDED = {  # the classes have no default, or one that makes an odd rotation
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "Glm4MoeForCausalLM": {"head_dim": 128},
}


def read(config: dict, tmp_path) -> target.TargetConfig:
    storage.write_json(f"{tmp_path}/config.json", config)
    return target.read_config(str(tmp_path))


def written(config: dict, whole: bool) -> dict:
    """What transformers writes of a config.json: all of it, or what differs from the class's defaults."""
    made = CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(config)))
    fields = made.to_dict() if whole else made.to_diff_dict()
    return json.loads(json.dumps(fields)) | {"architectures": config["architectures"]}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", golden.names())
def test_what_transformers_writes_is_the_same_target(name, whole, tmp_path):
    config = golden.config(name)
    assert read(written(config, whole), tmp_path) == read(config, tmp_path)


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_a_config_without_fields_is_the_class_of_its_family(architecture, tmp_path):
    bare = {"architectures": [architecture], "model_type": MODEL_TYPES[architecture]}
    bare |= NEEDED.get(architecture, {})
    cfg = read(bare, tmp_path)
    assert cfg == read(written(bare, True), tmp_path)
    assert cfg.raw == bare
    assert cfg.num_layers == cfg.text["num_hidden_layers"] > 20


def test_every_family_has_a_golden_or_is_one_with_a_vision_tower():
    assert set(FAMILIES) - set(MODEL_TYPES) == {"Gemma3ForConditionalGeneration"}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if not n.startswith("gemma-3")])
def test_fields_are_not_missed_in_published_files(name, tmp_path):
    """Each that equals the class's default may go."""
    config = PUBLISHED[name]
    default = CONFIG_MAPPING[config["model_type"]]().to_dict()
    kept = {key: value for key, value in config.items() if key not in default or default[key] != value}
    assert len(kept) < len(config)
    assert read(kept | {"model_type": config["model_type"]}, tmp_path) == read(config, tmp_path)


def test_known_defaults_of_families(tmp_path):
    def first(architecture: str, **more) -> target.TargetConfig:
        return read({"architectures": [architecture]} | more, tmp_path)

    oss = first("GptOssForCausalLM")
    rope = oss.layers[0].attention.rope
    assert (rope.theta, dict(rope.scaling)["rope_type"], dict(rope.scaling)["factor"]) == (
        150000.0,
        "yarn",
        32.0,
    )
    assert oss.norm.eps == 1e-5
    v3 = first("DeepseekV3ForCausalLM").layers[-1].feed_forward.router
    assert (v3.groups, v3.groups_kept, v3.scale) == (8, 4, 2.5)
    assert first("Glm4MoeLiteForCausalLM").layers[-1].feed_forward.router.scale == 1.8
    glm = first("Glm4MoeForCausalLM", head_dim=128)
    assert (glm.norm.eps, glm.layers[0].attention.rope.dim) == (1e-5, glm.layers[0].attention.head_dim // 2)
    assert first("Qwen3ForCausalLM", hidden_size=2560).layers[0].attention.head_dim == 128
    assert first("MiniMaxM2ForCausalLM", rotary_dim=64).layers[0].attention.rope.dim == 64


def test_integers_that_stand_for_numbers_are_taken(tmp_path):
    """transformers refuses some; other servers take them."""
    config = golden.config("deepseek_v3") | {"routed_scaling_factor": 2, "rms_norm_eps": 1}
    cfg = read(config, tmp_path)
    assert (cfg.layers[-1].feed_forward.router.scale, cfg.norm.eps) == (2.0, 1.0)


def test_configurations_are_read_without_torch_and_models(tmp_path):
    storage.write_json(f"{tmp_path}/config.json", golden.config("llama"))
    code = f"""if True:
        import sys
        from dump import target
        assert "transformers" not in sys.modules
        target.read_config({str(tmp_path)!r})
        assert not [name for name in sys.modules if name.startswith("transformers.models.llama.modeling")]
        assert "torch" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
