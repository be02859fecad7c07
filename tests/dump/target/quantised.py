"""Goldens quantised in every scheme that checkpoints use, beside the same values in float32."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from common import safetensors, storage
from tests.goldens import golden

FLOAT8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
BLOCK = (16, 8)


def compressed(strategy: str, ignore: tuple[str, ...] = ("lm_head",), **more) -> dict:
    """What compressed-tensors writes for one group of float8 weights."""
    about = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": about | more, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
    }


KEPT = "model.layers.0.self_attn.o_proj"  # what the scheme `channel` leaves alone
SCHEMES = {  # name -> (quantization_config, what shares a scale, what the scale is called, its shape if one)
    "block": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
        "block",
        "_inv",
        None,
    ),
    "whole": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "_inv", ()),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "channel", "", None),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, "tensor", "", ()),
    "ct_tensor": (compressed("tensor"), "tensor", "", (1,)),
    "ct_channel": (compressed("channel", ("lm_head", "re:.*mlp.gate$", KEPT)), "channel", "", None),
    "ct_block": (compressed("block", block_structure=list(BLOCK)), "block", "", None),
}
MATRIX = re.compile(r"layers\..*(?<!norm)(?<!(?:mlp|moe)\.gate)(?<!shared_expert_gate)(?<!conv1d)\.weight$")


def first_layers(made: golden.Golden, layers: int) -> golden.Golden:
    """A golden's model without its later layers."""

    def stays(name: str) -> bool:
        number = re.search(r"\.layers\.(\d+)\.", name)
        return number is None or int(number[1]) < layers

    shapes = {name: shape for name, shape in made.shapes.items() if stays(name)}
    config = {name: v[:layers] if isinstance(v, list) else v for name, v in made.config.items()}
    config |= {"architectures": made.config["architectures"], "num_hidden_layers": layers}
    return replace(made, shapes=shapes, config=config)


def _extent(shared: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    return {"block": BLOCK, "channel": (1, shape[1]), "tensor": shape}[shared]


def scales(value: np.ndarray, shared: str) -> np.ndarray:
    """What the largest value of each block is over the largest float8."""
    rows, columns = _extent(shared, value.shape)
    padded = np.pad(np.abs(value), [(0, -value.shape[0] % rows), (0, -value.shape[1] % columns)])
    return padded.reshape(-1, rows, padded.shape[1] // columns, columns).max((1, 3)) / 448


def spread(scale: np.ndarray, shared: str, shape: tuple[int, int]) -> np.ndarray:
    """Each scale over its block."""
    rows, columns = _extent(shared, shape)
    return np.repeat(np.repeat(scale, rows, 0), columns, 1)[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Form:
    """How a checkpoint writes its scales: their shape from (rows, columns), their name's end, their dtype."""

    shape: Callable[[tuple[int, int]], tuple[int, ...]] | None = None  # None: as the scheme has it
    suffix: str | None = None
    dtype: type = np.float32

    def rounded(self, scale: np.ndarray) -> np.ndarray:
        """Scales that the dtype holds exactly."""
        if self.dtype is E8M0:
            return 2.0 ** np.ceil(np.log2(scale))
        return scale.astype(self.dtype).astype(np.float32)


def folders(name: str, scheme: str, path, form: Form = Form(), layers: int | None = None) -> tuple[str, str]:
    """A golden (its first layers) quantised, and the same values in float32."""
    made = golden.read(name)
    whole = golden.write_folder(first_layers(made, layers) if layers else made, path / "whole")
    found = safetensors.Checkpoint.open(whole)
    config, shared, suffix, shape = SCHEMES[scheme]
    stored, plain = {}, {}
    for key in found.tensors:
        stored[key] = plain[key] = value = found.read(key)
        if MATRIX.search(key) and not (scheme == "ct_channel" and key.startswith(KEPT)):
            scale = form.rounded(scales(value, shared)).astype(np.float32)
            stored[key] = (value / spread(scale, shared, value.shape)).astype(FLOAT8)
            plain[key] = stored[key].astype(np.float32) * spread(scale, shared, value.shape)
            wanted = form.shape(scale.shape) if form.shape else scale.shape if shape is None else shape
            end = suffix if form.suffix is None else form.suffix
            stored[f"{key}_scale{end}"] = scale.reshape(wanted).astype(form.dtype)
    safetensors.write(f"{whole}/model.safetensors", plain)
    about = storage.read_json(f"{whole}/config.json") | {"quantization_config": config}
    storage.write_json(f"{path}/quantised/config.json", about)
    safetensors.write(f"{path}/quantised/model.safetensors", stored)
    return f"{path}/quantised", whole
