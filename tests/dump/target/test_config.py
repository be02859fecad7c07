"""Model folders that cannot be run exactly are refused in one line, before anything is allocated."""

import jax.numpy as jnp
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from dump.target.families import FAMILIES
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
