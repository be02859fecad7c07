"""Quantised weights stay quantised in memory and are dequantised when their layer runs.

Float8 says how a matrix [out, in] of the checkpoint was scaled: by one number, one a row, or one a block.
Formats: DeepSeek-V3 and Qwen ("fp8", blocks, `weight_scale_inv`), compressed-tensors and modelopt
(`weight_scale`), fbgemm (`weight_scale`, one a row). Value = stored * scale in all of them.
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from common.errors import EyasError
from dump.target.mxfp4 import Mxfp4
from dump.target.spec import Context, TargetConfig, Weight

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
METHODS = ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt", "mxfp4")


@dataclass(frozen=True)
class Float8:
    """`block` is (rows, columns) that share a scale; None in both places: all of them."""

    block: tuple[int | None, int | None]
    suffix: str  # what the scale's name has in place of "weight"
    scalar: bool = False  # one number a tensor is stored as [] rather than [1]

    def declare(self, name: str, weight: Weight) -> dict[str, Weight]:
        """The stored matrix and its scale. Block scales are whole on every chip: they are tiny."""
        shape = tuple(1 if b is None else -(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
        rows_alone = self.block == (1, None)
        axes = (weight.axes[0] if rows_alone else None, None)
        if self.block == (None, None):
            shape, axes = ((), ()) if self.scalar else ((1,), (None,))
        stored = replace(weight, dtype=FLOAT8, stored=FLOAT8)
        source = weight.source.removesuffix("weight") + self.suffix
        scale = replace(
            weight, source=source, shape=shape, axes=axes, dtype=np.dtype(np.float32), linear=False
        )
        return {name: stored, f"{name}.scale": scale}

    def apply(
        self, value: jax.Array, scale: jax.Array, weight: Weight, dtype: Any, context: Context
    ) -> jax.Array:
        """The matrix (or the experts' matrices) in `dtype`."""
        if self.block == (None, None):
            scale = scale.reshape(*scale.shape[: 1 if weight.experts else 0], 1, 1)
        elif self.block != (1, None):
            block = self.block[::-1] if weight.transposed else self.block
            for axis, size in ((-2, block[0]), (-1, block[1])):
                scale = _spread(scale, axis, size, value.shape[axis], context)
        return (value.astype(jnp.float32) * scale).astype(dtype)


def _spread(scale: jax.Array, axis: int, block: int, size: int, context: Context) -> jax.Array:
    """Repeats each scale over its block, for the `size` rows or columns that this chip holds."""
    split = -(-size // block) != scale.shape[axis]
    first = context.chip() * size if split else 0
    return jnp.take(scale, (first + jnp.arange(size)) // block, axis=axis)


def dequantised(
    schemes: tuple[tuple[str, Float8 | Mxfp4], ...],
    declared: Mapping[str, Weight],
    w: Mapping[str, jax.Array],
    dtype: Any,
    context: Context,
) -> dict[str, jax.Array]:
    """A layer's weights, its quantised ones made `dtype`."""
    done = dict(w)
    for name, scheme in schemes:
        done[name] = scheme.apply(w[name], done.pop(f"{name}.scale"), declared[name], dtype, context)
    return done


def quantise(cfg: TargetConfig, raw: dict[str, Any], where: str) -> TargetConfig:
    """The target with every linear matrix that `quantization_config` covers declared as quantised."""
    scheme, skipped = _scheme(raw, where)
    dimensions = 3 if isinstance(scheme, Mxfp4) else 2  # MXFP4 is for experts that are one tensor a layer
    layers = []
    for number, layer in enumerate(cfg.layers):
        named = layer.plain_weights(1)
        covered = tuple(
            (name, scheme)
            for name, weight in named.items()
            if weight.linear
            and len(weight.shape) == dimensions
            and not _skips(skipped, cfg.prefix + layer.own_name(weight.source), number)
        )
        layers.append(replace(layer, quantised=covered))
    return replace(cfg, layers=tuple(layers))


def _skips(skipped: list[str], source: str, layer: int) -> bool:
    """Whether a module is on the list of those that were left unquantised (exact, a parent, `*` or `re:`)."""
    module = source.format(layer=layer, expert=0).removesuffix(".weight")
    for pattern in skipped:
        if pattern.startswith("re:") or "*" in pattern:
            expression = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
            if re.match(expression, module):
                return True
        elif module == pattern or module.startswith(f"{pattern}.") or f".{pattern}." in f".{module}.":
            return True
    return False


def _scheme(raw: dict[str, Any], where: str) -> tuple[Float8 | Mxfp4, list[str]]:
    """The scheme and the modules that it leaves out; EyasError for anything else than weights in float8."""
    method = raw.get("quant_method")
    if method not in METHODS:
        raise EyasError(f"{where}: quantisation {method!r} is not supported; supported: {', '.join(METHODS)}")
    if method == "mxfp4":
        return Mxfp4(), list(raw.get("modules_to_not_convert") or [])
    if method == "fp8":
        if raw.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise EyasError(f"{where}: float8 format {raw['fmt']!r} is not supported; only e4m3 is")
        block = raw.get("weight_block_size")
        kept = list(raw.get("modules_to_not_convert") or [])
        return Float8(tuple(block) if block else (None, None), "weight_scale_inv", scalar=not block), kept
    if method == "fbgemm_fp8":
        return Float8((1, None), "weight_scale"), list(raw.get("modules_to_not_convert") or [])
    if method == "modelopt":
        if raw.get("quant_algo") != "FP8":
            raise EyasError(
                f"{where}: modelopt quant_algo {raw.get('quant_algo')!r} is not supported; only FP8 is"
            )
        return Float8((None, None), "weight_scale", scalar=True), list(
            raw.get("ignore") or raw.get("exclude_modules") or []
        )
    return _compressed(raw, where)


def _compressed(raw: dict[str, Any], where: str) -> tuple[Float8, list[str]]:
    """compressed-tensors: one group of 8-bit floats for all linear layers; EyasError for others."""
    groups = list((raw.get("config_groups") or {}).values())
    about = groups[0].get("weights") or {} if len(groups) == 1 else {}
    known = about.get("num_bits") == 8 and about.get("type") == "float" and about.get("symmetric", True)
    blocks = {
        "tensor": (None, None),
        "channel": (1, None),
        "block": tuple(about.get("block_structure") or ()),
    }
    if not known or groups[0].get("targets") != ["Linear"] or not blocks.get(about.get("strategy")):
        raise EyasError(
            f"{where}: this compressed-tensors scheme is not supported; one group of 8-bit floats is"
        )
    return Float8(blocks[about["strategy"]], "weight_scale"), list(raw.get("ignore") or [])
