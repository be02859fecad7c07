"""A float8 checkpoint gives what the same weights give when they are dequantised outside of the project."""

import re

import ml_dtypes
import numpy as np
import pytest

from common import checkpoint, files
from common.errors import EyasError
from dump import target
from tests.dump.target.test_parity import run
from tests.goldens import golden
from tests.goldens.values import tensor

FLOAT8 = ml_dtypes.float8_e4m3fn
COMPRESSED = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
SCHEMES = {
    "block": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 8]},
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "channel": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": COMPRESSED | {"strategy": "channel"}}
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.1.self_attn.o_proj"],
    },
}
MATRIX = re.compile(r"layers\..*(?<!norm)(?<!(?:mlp|moe)\.gate)(?<!conv1d)\.weight$")


def scales(value: np.ndarray, kind: str) -> np.ndarray:
    rows, columns = {"block": (16, 8), "channel": (1, value.shape[1]), "tensor": value.shape}[kind]
    padded = np.pad(np.abs(value), [(0, -value.shape[0] % rows), (0, -value.shape[1] % columns)])
    return padded.reshape(-1, rows, padded.shape[1] // columns, columns).max((1, 3)) / 448


def spread(scale: np.ndarray, kind: str, shape: tuple[int, int]) -> np.ndarray:
    rows, columns = {"block": (16, 8), "channel": (1, shape[1]), "tensor": shape}[kind]
    return np.repeat(np.repeat(scale, rows, 0), columns, 1)[: shape[0], : shape[1]]


def folders(name: str, kind: str, path) -> tuple[str, str]:
    """The quantised model, and the same values in float32."""
    whole = golden.write_folder(golden.read(name), path / "whole")
    found = checkpoint.Checkpoint.open(whole)
    stored, plain = {}, {}
    kept = "model.layers.1.self_attn.o_proj.weight" if kind == "channel" else None
    suffix = "_scale_inv" if kind == "block" else "_scale"
    for key in found.tensors:
        stored[key] = plain[key] = value = found.read(key)
        if MATRIX.search(key) and key != kept:
            scale = scales(value, kind)
            stored[key] = (value / spread(scale, kind, value.shape)).astype(FLOAT8)
            plain[key] = stored[key].astype(np.float32) * spread(scale, kind, value.shape)
            stored[key + suffix] = scale.reshape(()) if kind == "tensor" else scale
    checkpoint.write(f"{whole}/model.safetensors", plain)
    config = files.read_json(f"{whole}/config.json") | {"quantization_config": SCHEMES[kind]}
    files.write_json(f"{path}/quantised/config.json", config)
    checkpoint.write(f"{path}/quantised/model.safetensors", stored)
    return f"{path}/quantised", whole


@pytest.mark.parametrize(
    ("name", "kind", "tp"),
    [
        ("llama", "tensor", 1),
        ("glm4_moe", "channel", 2),
        ("deepseek_v3", "block", 1),
        ("minimax_m2", "block", 2),
    ],
)
def test_float8_equals_its_values(name, kind, tp, tmp_path):
    quantised, plain = folders(name, kind, tmp_path)
    made = golden.read(name)
    found, expected = run(made, quantised, 1, tp), run(made, plain, 1, 1)
    for key in ("aux", "last", "logits"):
        size = np.sqrt(np.mean(np.square(expected[key])))
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-4 * size)


def test_mxfp4_equals_its_values(tmp_path):
    made = golden.read("gpt_oss")
    plain_folder = golden.write_folder(made, tmp_path / "plain")
    found = checkpoint.Checkpoint.open(plain_folder)
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
    checkpoint.write(f"{plain_folder}/model.safetensors", plain)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = made.config | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    }
    files.write_json(f"{tmp_path}/quantised/config.json", config)
    checkpoint.write(f"{tmp_path}/quantised/model.safetensors", stored)
    outcome, expected = run(made, f"{tmp_path}/quantised", 1, 2), run(made, plain_folder, 1, 1)
    for key in ("aux", "last", "logits"):
        size = np.sqrt(np.mean(np.square(expected[key])))
        np.testing.assert_allclose(outcome[key], expected[key], rtol=1e-4, atol=1e-4 * size)


def test_a_missing_scale_is_named(tmp_path):
    quantised, _ = folders("llama", "tensor", tmp_path)
    found = checkpoint.Checkpoint.open(quantised)
    gone = "model.layers.4.mlp.up_proj.weight_scale"
    checkpoint.write(f"{quantised}/model.safetensors", {k: found.read(k) for k in found.tensors if k != gone})
    with pytest.raises(EyasError, match=gone):
        run(golden.read("llama"), quantised, 1, 1)


def test_float8_stays_float8_in_memory(tmp_path):
    quantised, _ = folders("llama", "tensor", tmp_path)
    declared = target.parameters(target.read_config(quantised))
    assert declared["0.0.q_proj"].dtype == FLOAT8
