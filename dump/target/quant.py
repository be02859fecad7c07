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
from common.safetensors import DTYPES, FLOATS
from dump.target.mxfp4 import Mxfp4
from dump.target.spec import Context, TargetConfig, Weight

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_SUFFIXES = ("weight_scale", "weight_scale_inv")  # both names are in use for the same thing


@dataclass(frozen=True)
class Float8:
    """`block` is (rows, columns) of the checkpoint's matrix that share a scale; None: all of them."""

    block: tuple[int | None, int | None]
    suffix: str  # what the scale's name has in place of "weight"

    def declare(self, name: str, weight: Weight) -> dict[str, Weight]:
        """The stored matrix and its scale [rows / block, columns / block], 1 where all share one.

        Scales of single rows are split as the rows are; others are whole on every chip: they are tiny.
        """
        shape = tuple(1 if b is None else -(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
        axes = tuple(axis if b == 1 else None for axis, b in zip(weight.axes, self.block, strict=True))
        module = weight.source.removesuffix("weight")
        (other,) = set(_SUFFIXES) - {self.suffix}
        scale = replace(
            weight,
            source=module + self.suffix,
            other=module + other,
            shape=shape,
            axes=axes,
            dtype=np.dtype(np.float32),
            stored=(*FLOATS, DTYPES["F8_E8M0"]),
            squeezed=True,
            linear=False,
        )
        return {name: replace(weight, dtype=FLOAT8, stored=(FLOAT8,)), f"{name}.scale": scale}

    def apply(
        self, value: jax.Array, scale: jax.Array, weight: Weight, dtype: Any, context: Context
    ) -> jax.Array:
        """The matrix (or the experts' matrices) in `dtype`."""
        block = self.block[::-1] if weight.transposed else self.block
        for axis, size in zip((-2, -1), block, strict=True):
            if size not in (None, 1):  # those broadcast
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


def quantise(cfg: TargetConfig, scheme: Any, left_out: list[str]) -> TargetConfig:
    """The target with every linear matrix but those of `left_out` declared as quantised.

    EyasError where the scheme meets a layout that no checkpoint stores in it.
    """
    fused = isinstance(scheme, Mxfp4)  # for experts that are one tensor a layer, and for nothing else
    layers = []
    for number, layer in enumerate(cfg.layers):
        covered = []
        for name, weight in layer.plain_weights(1).items():
            source = cfg.prefix + layer.own_name(weight.source)
            if not weight.linear or is_left_out(left_out, source, number):
                continue
            if len(weight.shape) == 3 and not fused:
                module = source.format(layer=number)
                raise EyasError(
                    f"the experts {module} are one tensor, which is supported in mxfp4 but not in float8; "
                    "use the model's mxfp4 or unquantised checkpoint"
                )
            if fused == (len(weight.shape) == 3):
                covered.append((name, scheme))
        layers.append(replace(layer, quantised=tuple(covered)))
    if not any(layer.quantised for layer in layers):
        kind = "experts that are one tensor a layer" if fused else "linear layers"
        raise EyasError(f"covers nothing: this target has no {kind} that are not left out")
    return replace(cfg, layers=tuple(layers))


def is_left_out(left_out: list[str], source: str, layer: int) -> bool:
    """Whether a module is among those that were left unquantised (exact, a parent, `*` or `re:`)."""
    module = source.format(layer=layer, expert=0).removesuffix(".weight")
    for pattern in left_out:
        if pattern.startswith("re:") or "*" in pattern:
            expression = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
            if re.match(expression, module):
                return True
        elif module == pattern or module.startswith(f"{pattern}.") or f".{pattern}." in f".{module}.":
            return True
    return False
