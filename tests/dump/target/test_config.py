"""Model folders that cannot be run exactly are refused in one line, before anything is allocated."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from dump.target.families import FAMILIES
from dump.target.schema import ConfigJson
from tests.goldens import golden


@pytest.fixture
def folder(tmp_path):
    return golden.write_folder(golden.read("llama"), tmp_path)


def edit(folder: str, **changes) -> str:
    path = f"{folder}/config.json"
    config = storage.read_json(path) | changes
    storage.write_json(path, {k: v for k, v in config.items() if v != "absent"})
    return folder


def refused(call, *words: str) -> None:
    with pytest.raises(EyasError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def why_refused(folder: str) -> str | None:
    try:
        target.read_config(folder)
    except EyasError as error:
        return str(error)
    return None


def test_a_folder_without_config_is_refused(tmp_path):
    refused(lambda: target.read_config(str(tmp_path)), "config.json", "missing")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: target.read_config(str(tmp_path)), "not JSON")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": "absent"}, ["supported", *sorted(FAMILIES)]),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, ["auto_map", "own code"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["longrope"]),
        ({"logit_scale": 2.0}, ["logit_scale"]),
        ({"hidden_size": "absent"}, ["hidden size (4096)"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads=6"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quant", "awq"]),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(folder, changes, words):
    refused(lambda: target.read_config(edit(folder, **changes)), "config.json", *words)


OTHERS = [None, True, "x", "1000", 5, -1, 0, 3.5, 10**12, 10**400, float("nan"), float("inf")]
OTHERS += [[], ["a"], [1], [[]], {}, {"a": 1}, {"rope_type": []}, {"full_attention": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ConfigJson.__annotations__))
def test_a_value_of_another_type_is_one_line_or_a_config(name, tmp_path):
    """Of every field that is read, in every family's own class."""
    for family in ("llama", "gpt_oss", "gemma3", "glm_moe_dsa", "qwen3_next", "minimax_m2"):
        for value in OTHERS:
            text = json.dumps(golden.config(family) | {name: value})
            (tmp_path / "config.json").write_text(text)
            told = why_refused(str(tmp_path))
            assert told is None or ("config.json" in told and "\n" not in told)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("architectures", "LlamaForCausalLM", ['architectures is "LlamaForCausalLM"', "list"]),
        ("architectures", [3], ["architectures.0 is 3", "string"]),
        ("architectures", [], ["architectures is []"]),
        ("rope_scaling", [1], ["rope_scaling is [1]"]),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}, ['rope_scaling.factor is "2"', "number"]),
        ("rope_scaling", {"rope_type": "yarn", "original_max_position_embeddings": 8}, ["factor"]),
        (
            "rope_scaling",
            {"rope_type": "linear", "factor": 0},
            ["factor is 0", "greater"],
        ),
        ("rope_theta", "10000", ['rope_theta is "10000"', "number"]),
        ("rms_norm_eps", None, ["rms_norm_eps is null"]),
        ("rms_norm_eps", float("nan"), ["NaN", "no number"]),
        ("rms_norm_eps", float("inf"), ["Infinity", "no number"]),
        ("rms_norm_eps", -1e-6, ["rms_norm_eps is -1e-06"]),
        ("hidden_size", True, ["hidden_size is true"]),
        ("num_hidden_layers", 10**9, ["num_hidden_layers is 1000000000", "1000"]),
        ("head_dim", 5, ["head_dim", "5"]),
        ("partial_rotary_factor", 0.5, ["partial_rotary_factor=0.5", "other servers"]),
        ("layer_types", ["full_attention"], ["layer_types"]),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 7.0},
            ["rope_scaling and rope_parameters"],
        ),
    ],
)
def test_the_line_names_the_field_what_it_is_and_what_is_expected(folder, field, value, words):
    text = json.dumps(storage.read_json(f"{folder}/config.json") | {field: value})
    with open(f"{folder}/config.json", "w") as file:
        file.write(text)
    refused(lambda: target.read_config(folder), "config.json", *words)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "NaN", "[" * 5000, '{"a":' * 5000])
def test_a_file_that_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(lambda: target.read_config(str(tmp_path)), "config.json")


def test_a_part_of_one_kind_of_layers_cannot_be_rotated_either(tmp_path):
    each = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    config = golden.config("gemma3") | {"rope_scaling": None, "rope_parameters": {"sliding_attention": each}}
    storage.write_json(f"{tmp_path}/config.json", config)
    refused(lambda: target.read_config(str(tmp_path)), "partial_rotary_factor=0.5")


def test_two_names_of_a_field_must_agree(tmp_path):
    config = golden.config("qwen3_moe")
    storage.write_json(f"{tmp_path}/config.json", config | {"num_local_experts": 12})
    assert target.read_config(str(tmp_path)).layers[1].feed_forward.router.experts == 12
    storage.write_json(f"{tmp_path}/config.json", config | {"num_local_experts": 13})
    refused(lambda: target.read_config(str(tmp_path)), "num_experts=12", "num_local_experts=13")


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3", {"n_group": 5}, ["12 in 5 groups"]),
        ("deepseek_v3", {"num_experts_per_tok": 9}, ["9 experts a token"]),
        ("qwen3_moe", {"num_experts_per_tok": 13}, ["13 experts a token", "12"]),
        ("qwen3_next", {"linear_num_key_heads": 4}, ["linear_num_value_heads=6", "linear_num_key_heads=4"]),
        ("qwen3", {"num_key_value_heads": 5}, ["num_attention_heads=6", "num_key_value_heads=5"]),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_refused(family, changes, words, tmp_path):
    storage.write_json(f"{tmp_path}/config.json", golden.config(family) | changes)
    refused(lambda: target.read_config(str(tmp_path)), "config.json", *words)


def test_dense_layers_that_servers_count_in_two_ways_are_refused(tmp_path):
    """transformers' class of GLM-4.7-Flash knows mlp_layer_types alone."""
    config = golden.config("glm4_moe_lite") | {"first_k_dense_replace": 2}
    storage.write_json(f"{tmp_path}/config.json", config)
    refused(lambda: target.read_config(str(tmp_path)), "first_k_dense_replace=2", "1 dense of 8 layers")
    config["mlp_layer_types"] = ["dense"] * 2 + ["sparse"] * 6
    storage.write_json(f"{tmp_path}/config.json", config)
    layers = target.read_config(str(tmp_path)).layers
    assert [hasattr(layer.feed_forward, "router") for layer in layers] == [False] * 2 + [True] * 6


def test_harmless_fields_are_accepted(folder):
    edit(folder, use_cache=False, torch_dtype="bfloat16", is_llama_config=True, some_future_switch=None)
    assert target.read_config(folder).num_layers == 8


def load(folder: str, dp: int = 1, tp: int = 1):
    return target.load(folder, target.read_config(folder), make_mesh(dp, tp), jnp.float32)


def test_a_missing_tensor_is_named(folder):
    path = f"{folder}/model.safetensors"
    tensors = read_all(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    safetensors.write(path, tensors)
    refused(lambda: load(folder), "model.layers.3.mlp.up_proj.weight", "lacks")


def test_a_tensor_of_another_shape_is_named(folder):
    edit(folder, intermediate_size=45)
    refused(lambda: load(folder), "gate_proj", "[44, 24]", "[45, 24]")


def test_a_tensor_of_another_dtype_is_named(folder):
    path = f"{folder}/model.safetensors"
    tensors = read_all(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    safetensors.write(path, tensors)
    refused(lambda: load(folder), "model.norm.weight", "int32")


def test_tensors_that_config_does_not_explain_are_refused(folder):
    path = f"{folder}/model.safetensors"
    tensors = read_all(path) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    safetensors.write(path, tensors)
    refused(lambda: load(folder), "q_proj.bias")
    tensors = read_all(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors.pop(
        "model.layers.0.self_attn.q_proj.bias"
    )
    safetensors.write(path, tensors)
    load(folder)


def test_a_mesh_that_does_not_divide_the_heads_is_refused(folder):
    refused(lambda: load(folder, 1, 4), "tp=4", "heads")


def test_default_aux_layers_need_seven_layers():
    assert target.default_aux_layers(8) == (2, 4, 5)
    assert target.default_aux_layers(7) == (2, 3, 4)
    refused(lambda: target.default_aux_layers(6), "6 layers", "7")


def test_dynamic_rope_refuses_rows_that_would_change_it(folder):
    edit(folder, rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=64)
    cfg = target.read_config(folder)
    target.check_length(cfg, 64)
    refused(lambda: target.check_length(cfg, 65), "65 tokens", "dynamic", "--length 64")


def read_all(path: str) -> dict[str, np.ndarray]:
    found = safetensors.Checkpoint.open(path.rsplit("/", 1)[0])
    return {name: found.read(name) for name in found.tensors}
