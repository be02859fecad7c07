"""A quantised checkpoint gives what its values give when they are dequantised outside of the project."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from tests.dump.target.quantised import FLOAT8, SCHEMES, compressed, folders
from tests.dump.target.test_parity import run
from tests.goldens import golden
from tests.goldens.values import tensor


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
    ],
)
def test_an_unknown_quantisation_is_refused(about, words, tmp_path):
    folder = golden.write_folder(golden.read("llama"), tmp_path)
    path = f"{folder}/config.json"
    storage.write_json(
        path, storage.read_json(path) | {"quantization_config": about or {"quant_method": None}}
    )
    with pytest.raises(EyasError) as error:
        target.read_config(folder)
    assert "\n" not in str(error.value)
    for word in ["config.json", *words]:
        assert word in str(error.value)


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
