"""A quantization_config becomes a scheme and the modules that it leaves out, or a refusal.

What says how a server rounds activations, or keys and values in its cache, is accepted and left alone: both
approximate the function that the stored weights define, and that function is what is computed here. What
changes the function itself (rotations of the weights, sparse storage, rounded outputs) is refused, as
is every field that nobody reads.
"""

import re
from typing import Any

from common.errors import EyasError
from dump.target.fields import Fields
from dump.target.mxfp4 import Mxfp4
from dump.target.quant import Float8
from dump.target.schema import Quantisation, QuantisedGroup, QuantisedWeights, short

METHODS = ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt", "mxfp4")
_PER_TENSOR, _PER_ROW = (None, None), (1, None)
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")

# Rounding of activations and of the cache, how scales were found, and what a loader does with the file.
_HARMLESS = frozenset(
    {"producer", "version", "quantization_status", "global_compression_ratio", "kv_cache_scheme"}
    | {"kv_cache_quant_algo", "activation_scheme", "activation_scale_ub", "input_activations", "observer"}
    | {"observer_kwargs", "actorder", "scale_dtype", "zp_dtype", "dequantize", "run_compressed"}
)


def read_quantisation(raw: dict[str, Any], where: str) -> tuple[Float8 | Mxfp4, list[str]]:
    """The scheme and the modules that it leaves out; EyasError for anything else than weights in float8 or
    experts in MXFP4.
    """
    f = Fields(raw, where, Quantisation, _HARMLESS)
    method = f.get("quant_method", None)
    if method not in METHODS:
        raise EyasError(f"{where}: quantisation {method!r} is not supported; supported: {', '.join(METHODS)}")
    scheme = _scheme(f, method)
    left_out = [pattern for name in _LEFT_OUT for pattern in f.get(name, [])]
    f.finish()
    for pattern in left_out:
        _check_pattern(pattern, where)
    return scheme, left_out


def _scheme(f: Fields, method: str) -> Float8 | Mxfp4:
    if method == "mxfp4":
        return Mxfp4()
    if method == "fbgemm_fp8":
        return Float8(_PER_ROW, "weight_scale")
    if method == "fp8":
        f.only("fmt", "e4m3", "float8_e4m3fn")
        f.only("scale_fmt", "float", "ue8m0")
        f.only("expert_dtype", "fp8")
        block = f.get("weight_block_size", None)
        return Float8(tuple(block) if block else _PER_TENSOR, "weight_scale_inv")
    if method == "modelopt":
        if f.get("quant_algo", None) != "FP8":
            raise EyasError(
                f"{f.where}: quant_algo {f.get('quant_algo', None)!r} is not supported; only FP8 is"
            )
        if not f.get("config_groups", None):
            return Float8(_PER_TENSOR, "weight_scale")
    else:
        f.only("format", "float-quantized", "naive-quantized")
        sparse = f.get("sparsity_config", None) or {}
        if sparse.get("format", "dense") != "dense":
            raise EyasError(
                f"{f.where}: sparsity_config={short(sparse)} is not supported; only dense weights are"
            )
    return Float8(_block(f), "weight_scale")


def _block(f: Fields) -> tuple[int | None, int | None]:
    """What shares a scale in the one group of 8-bit floats that config_groups has; EyasError for others."""
    groups = f.get("config_groups", None) or {}
    if len(groups) != 1:
        raise EyasError(
            f"{f.where}: config_groups has {len(groups)} groups; one group of 8-bit floats is supported"
        )
    ((name, about),) = groups.items()
    group = Fields(about, f"{f.where}.config_groups.{name}", QuantisedGroup, _HARMLESS)
    if group.get("targets") != ["Linear"]:
        raise EyasError(
            f"{group.where}: targets={short(about['targets'])} are not supported; only ['Linear'] is"
        )
    group.only("format", "float-quantized", "naive-quantized")
    weights = Fields(group.get("weights"), f"{group.where}.weights", QuantisedWeights, _HARMLESS)
    group.finish()
    if (weights.get("num_bits", 8), weights.get("type", "int")) != (8, "float"):
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        raise EyasError(
            f"{weights.where} are {bits}-bit numbers of type {kind}; only 8-bit floats are supported"
        )
    weights.only("symmetric", True)
    weights.only("dynamic", False)
    strategy = weights.only("strategy", "tensor", "channel", "block")
    block = tuple(weights.get("block_structure")) if strategy == "block" else None
    weights.finish()
    return block or {"tensor": _PER_TENSOR, "channel": _PER_ROW}[strategy]


def _check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        if pattern.startswith("re:"):
            raise EyasError(f"{where}: {pattern!r} is no regular expression ({error}); correct it") from None
