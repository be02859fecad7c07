"""A quantised checkpoint gives what its values give when they are dequantised outside of the project."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from tests.dump.target.quantised import E8M0, FLOAT8, SCHEMES, Form, compressed, first_layers, folders
from tests.dump.target.test_parity import run
from tests.goldens import golden
from tests.goldens.values import tensor

LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


def grouped(second: dict | None = None, **more) -> dict:
    """compressed-tensors whose group has other fields, or a second group beside it."""
    about = compressed("channel")
    about["config_groups"]["group_0"] |= more
    about["config_groups"] |= {"group_1": second} if second else {}
    return about


def assert_same(found, expected, tolerance: float = 1e-4) -> None:
    for key in ("aux", "last", "logits"):
        size = np.sqrt(np.mean(np.square(expected[key])))
        np.testing.assert_allclose(found[key], expected[key], rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize(
    ("name", "scheme", "tp"),
    [
        ("llama", "modelopt", 1),
        ("llama", "whole", 1),
        ("qwen3", "fbgemm", 2),
        ("qwen2", "ct_tensor", 1),
        ("glm4_moe", "ct_channel", 2),
        ("qwen3_moe", "ct_block", 2),
        ("qwen3_moe", "modelopt", 2),
        ("deepseek_v3", "block", 1),
        ("minimax_m2", "block", 2),
    ],
)
def test_float8_equals_its_values_kept_and_dequantised_at_load(name, scheme, tp, tmp_path):
    quantised, plain = folders(name, scheme, tmp_path)
    made = golden.read(name)
    kept = run(made, quantised, 1, tp)
    assert_same(kept, run(made, plain, 1, 1))
    assert_same(run(made, quantised, 1, tp, dequantise=True), kept, 1e-6)


LAYOUTS = [("qwen3", None, 1), ("qwen3", None, 2), ("qwen3_moe_raw", None, 1)]
LAYOUTS += [("qwen3_moe_raw", "ffn", 2), ("qwen3_moe_raw", "expert", 2)]


def assert_dequantises(quantised: str, plain: str, experts: str | None, tp: int) -> None:
    """Every matrix is, to the last bit, what NumPy made of the stored values and scales."""
    mesh = make_mesh(1, tp)
    cfg = target.read_config(quantised, experts, dequantise=True)
    found = target.load(quantised, cfg, mesh, jnp.float32)
    expected = target.load(plain, target.read_config(plain, experts), mesh, jnp.float32)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(("name", "experts", "tp"), LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_in_every_layout_gives_the_stored_values(scheme, name, experts, tp, tmp_path):
    assert_dequantises(*folders(name, scheme, tmp_path, layers=1), experts, tp)


FORMS = {
    "number": ("whole", Form(lambda shape: ())),
    "one": ("modelopt", Form(lambda shape: (1,))),
    "one_by_one": ("whole", Form(lambda shape: (1, 1))),
    "one_of_another_name": ("whole", Form(lambda shape: (1,), "")),
    "rows": ("ct_channel", Form(lambda shape: shape[:1])),
    "rows_of_one": ("fbgemm", Form(lambda shape: (shape[0], 1), "_inv")),
    "blocks_between_ones": ("ct_block", Form(lambda shape: (shape[0], 1, shape[1], 1))),
    "powers_of_two": ("block", Form(dtype=E8M0)),
    "powers_of_two_in_rows": ("ct_channel", Form(dtype=E8M0)),
    "bfloat16": ("ct_tensor", Form(dtype=ml_dtypes.bfloat16)),
}


@pytest.mark.parametrize("form", FORMS)
def test_scales_are_read_in_every_form_that_checkpoints_have(form, tmp_path):
    scheme, written = FORMS[form]
    assert_dequantises(*folders("qwen3_moe_raw", scheme, tmp_path, written, 1), "expert", 2)


def test_activation_scales_change_nothing(tmp_path):
    """Of static quantisation: the forward pass computes with activations as they are."""
    quantised, plain = folders("qwen3_moe_raw", "whole", tmp_path, layers=1)
    found = safetensors.Checkpoint.open(quantised)
    tensors = {name: found.read(name) for name in found.tensors}
    for name in list(tensors):
        if name.endswith("_scale_inv"):
            module = name.removesuffix("weight_scale_inv")
            tensors[f"{module}activation_scale"] = tensors[f"{module}input_scale"] = np.float32(3.0)
    for cache in ("k_proj.k_scale", "v_proj.v_scale", "attn.k_scale", "k_scale", "kv_scale"):
        tensors[f"model.layers.0.self_attn.{cache}"] = np.float32(3.0)
    tensors["model.layers.0.self_attn.q_proj.input_scale_ub"] = np.ones(1, np.float32)
    safetensors.write(f"{quantised}/model.safetensors", tensors)
    assert_dequantises(quantised, plain, None, 1)


def write_mxfp4(made: golden.Golden, path) -> tuple[str, str]:
    """gpt-oss with 4-bit experts, and the same values in float32."""
    plain_folder = golden.write_folder(made, path / "plain")
    found = safetensors.Checkpoint.open(plain_folder)
    plain = {name: found.read(name) for name in found.tensors}
    stored = dict(plain)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([table, -table])
    for name in [n for n in plain if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, into, out = plain[name].shape
        blocks = tensor(f"{name}_blocks", (experts, out, into // 32, 16), "U8")
        scales = tensor(f"{name}_scales", (experts, out, into // 32), "U8")
        values = np.stack([table[blocks & 15], table[blocks >> 4]], -1).reshape(experts, out, -1, 32)
        values = np.ldexp(values, scales[..., None].astype(np.int32) - 127).reshape(experts, out, into)
        plain[name] = values.swapaxes(1, 2).astype(np.float32)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del stored[name]
    safetensors.write(f"{plain_folder}/model.safetensors", plain)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    about = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    storage.write_json(f"{path}/quantised/config.json", made.config | {"quantization_config": about})
    safetensors.write(f"{path}/quantised/model.safetensors", stored)
    return f"{path}/quantised", plain_folder


def test_mxfp4_equals_its_values_kept_and_dequantised_at_load(tmp_path):
    made = golden.read("gpt_oss")
    quantised, plain = write_mxfp4(made, tmp_path)
    kept = run(made, quantised, 1, 2)
    assert_same(kept, run(made, plain, 1, 1))
    assert_same(run(made, quantised, 1, 2, dequantise=True), kept, 1e-6)


@pytest.mark.parametrize("tp", [1, 2])
def test_mxfp4_experts_give_the_stored_values(tp, tmp_path):
    quantised, plain = write_mxfp4(first_layers(golden.read("gpt_oss"), 1), tmp_path)
    assert_dequantises(quantised, plain, None, tp)


def test_weights_stay_as_they_lie_in_memory_unless_dequantised(tmp_path):
    quantised, _ = folders("llama", "modelopt", tmp_path)
    cfg = target.read_config(quantised)
    assert target.parameters(cfg)["0.0.q_proj"].dtype == FLOAT8
    plain = replace(cfg, dequantise=True)
    assert target.parameters(plain).keys() == {n for n in target.parameters(cfg) if not n.endswith(".scale")}
    weights = target.load(quantised, plain, make_mesh(), jnp.bfloat16)
    assert {w.dtype.name for w in weights.values()} == {"bfloat16"}


def test_older_modelopt_checkpoints_describe_themselves_in_their_own_file(tmp_path):
    quantised, _ = folders("llama", "modelopt", tmp_path)
    config = storage.read_json(f"{quantised}/config.json")
    described = target.read_config(quantised)
    del config["quantization_config"]
    storage.write_json(f"{quantised}/config.json", config)
    about = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    storage.write_json(f"{quantised}/hf_quant_config.json", about)
    assert target.read_config(quantised) == described


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"quant_method": "gptq"}, ["'gptq'", "compressed-tensors, fbgemm_fp8, fp8, modelopt, mxfp4"]),
        ({}, ["None", "fbgemm_fp8"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["e5m2", "e4m3"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["NVFP4", "FP8"]),
        (compressed("channel", type="int"), ["8-bit floats"]),
        (compressed("channel", num_bits=4), ["8-bit floats"]),
        (compressed("group"), ['strategy="group"', "'channel'"]),
        (compressed("block"), ["block_structure"]),
        (compressed("channel") | {"config_groups": {}}, ["8-bit floats"]),
        (compressed("channel") | {"transform_config": {"config_groups": {"R1": {}}}}, ["transform_config"]),
        (compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config"]),
        (compressed("channel") | {"format": "pack-quantized"}, ["pack-quantized"]),
        (compressed("channel") | {"kind_of_tomorrow": 1}, ["kind_of_tomorrow=1"]),
        (grouped(output_activations={"num_bits": 8}), ["group_0 sets output_activations"]),
        (grouped(targets=["re:.*mlp.*"]), ["group_0: targets"]),
        (grouped(weights=None), ["config_groups.group_0", "weights is null"]),
        (grouped(second={"weights": {}}), ["2 groups"]),
        (compressed("channel", dynamic=True), ["dynamic=true"]),
        (compressed("channel", symmetric=False), ["symmetric=false"]),
        (compressed("channel", zero_point=1), ["zero_point=1"]),
        (compressed("channel") | {"ignore": "lm_head"}, ['ignore is "lm_head"', "list"]),
        (compressed("channel") | {"ignore": ["re:("]}, ["'re:('", "regular expression"]),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size is [128]"]),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, ["weight_block_size.1 is 0"]),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, ['expert_dtype="fp4"']),
        ({"quant_method": "fp8", "scale_fmt": "log"}, ['scale_fmt="log"']),
        ({"quant_method": "mxfp4"}, ["covers nothing", "experts"]),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model"]}, ["covers nothing", "linear"]),
        ([1], ["quantization_config is [1]"]),
        ("fp8", ['quantization_config is "fp8"']),
    ],
)
def test_an_unknown_quantisation_is_refused(about, words, tmp_path):
    folder = golden.write_folder(golden.read("llama"), tmp_path)
    path = f"{folder}/config.json"
    storage.write_json(
        path, storage.read_json(path) | {"quantization_config": about or {"quant_method": None}}
    )
    refused(folder, "config.json", *words)


def refused(folder: str, *words: str) -> None:
    with pytest.raises(EyasError) as error:
        target.read_config(folder)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_float8_experts_in_one_tensor_are_refused_unless_they_are_left_out(tmp_path):
    folder = golden.write_folder(golden.read("gpt_oss"), tmp_path)
    path, about = f"{folder}/config.json", {"quant_method": "fp8"}
    config = storage.read_json(path)
    storage.write_json(path, config | {"quantization_config": about})
    refused(folder, "model.layers.0.mlp.experts.gate_up_proj", "one tensor", "mxfp4")
    about["modules_to_not_convert"] = ["experts"]
    storage.write_json(path, config | {"quantization_config": about})
    assert {len(layer.quantised) for layer in target.read_config(folder).layers} == {4}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("scheme", ["block", "whole", "fbgemm", "modelopt", "ct_tensor"])
def test_left_out_modules_are_read_under_every_name(scheme, name, tmp_path):
    about = {key: value for key, value in SCHEMES[scheme][0].items() if key not in LISTS}
    path = f"{tmp_path}/config.json"
    config = golden.config("llama") | {"quantization_config": about | {name: ["model.layers.3.mlp"]}}
    storage.write_json(path, config)
    layers = target.read_config(str(tmp_path)).layers
    assert [len(layer.quantised) for layer in layers] == [7, 7, 7, 4, 7, 7, 7, 7]


def test_what_transformers_itself_writes_of_float8_is_accepted(tmp_path):
    blocks = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    whole = blocks | {"activation_scheme": "dynamic", "dequantize": False, "expert_dtype": "fp8"}
    whole |= {"modules_to_convert": None, "modules_to_not_convert": None, "scale_fmt": "float"}
    found = []
    for about in (blocks, whole):
        storage.write_json(f"{tmp_path}/config.json", golden.config("llama") | {"quantization_config": about})
        found.append(target.read_config(str(tmp_path)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "more",
    [
        {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
        {"kv_cache_scheme": "static"},
        {"sparsity_config": {"format": "dense"}, "transform_config": {}},
        {"quantization_status": "compressed", "global_compression_ratio": 1.5, "version": "0.10"},
    ],
)
def test_what_leaves_the_weights_alone_is_accepted(more, tmp_path):
    path = f"{tmp_path}/config.json"
    found = []
    for about in (compressed("channel"), compressed("channel") | more):
        storage.write_json(path, golden.config("llama") | {"quantization_config": about})
        found.append(target.read_config(str(tmp_path)))
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [[], 5, None, {"quantization": 5}, {"quantization": {"quant_algo": [1]}}])
def test_a_damaged_file_of_modelopt_is_named(value, tmp_path):
    folder = golden.write_folder(golden.read("llama"), tmp_path)
    storage.write_json(f"{folder}/hf_quant_config.json", value)
    refused(folder, "hf_quant_config.json")


def damaged(folder: str, name: str, change) -> None:
    """Rewrites the checkpoint with `name` changed, or gone where `change` gives None."""
    found = safetensors.Checkpoint.open(folder)
    tensors = {key: found.read(key) for key in found.tensors}
    tensors[name] = change(tensors[name])
    kept = {key: value for key, value in tensors.items() if value is not None}
    safetensors.write(f"{folder}/model.safetensors", kept)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("scale", lambda x: None, ["lacks", "fetch"]),
        ("scale", lambda x: np.ones((3, 3), np.float32), ["[3, 3]", "config.json asks for"]),
        ("scale", lambda x: np.ones(x.shape, np.int32), ["int32", "float32"]),
        ("weight", lambda x: x.astype(np.float32), ["float32", "float8_e4m3fn", "quantization_config"]),
        ("weight", lambda x: x[:-1], ["config.json asks for"]),
    ],
)
def test_damage_is_named_before_a_device_holds_anything(scheme, what, change, words, tmp_path, monkeypatch):
    quantised, _ = folders("qwen3", scheme, tmp_path)
    name = "model.layers.4.mlp.up_proj.weight"
    name = f"{name}_scale{SCHEMES[scheme][2]}" if what == "scale" else name
    damaged(quantised, name, change)
    monkeypatch.setattr(jax, "device_put", None)
    with pytest.raises(EyasError) as error:
        target.load(quantised, target.read_config(quantised), make_mesh(), jnp.float32)
    assert "\n" not in str(error.value)
    for word in [f" {name} ", *words]:
        assert word in str(error.value)
