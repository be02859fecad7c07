"""MXFP4: 4-bit floats, two a byte, with a power of two for every 32 of them.

Source: OCP Microscaling Formats (MX) v1.0; layout of gpt-oss: [E, out, in / 32, 16] bytes, low nibble first.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dump.target.spec import Context, Weight

_BLOCK = 32  # values that share a scale
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True)
class Mxfp4:
    """The matrices [E, in, out] of a layer's experts, held as blocks and scales."""

    def declare(self, name: str, weight: Weight) -> dict[str, Weight]:
        experts, into, out = weight.shape
        shape = (experts, out, into // _BLOCK)
        expert = weight.axes[0]
        common = {"dtype": _BYTE, "stored": (_BYTE,), "linear": False}
        axes = (expert, None, None)
        blocks = replace(
            weight,
            source=f"{weight.source}_blocks",
            shape=(*shape, _BLOCK // 2),
            axes=(*axes, None),
            **common,
        )
        scales = replace(weight, source=f"{weight.source}_scales", shape=shape, axes=axes, **common)
        return {name: blocks, f"{name}.scale": scales}

    def apply(
        self, value: jax.Array, scale: jax.Array, weight: Weight, dtype: Any, context: Context
    ) -> jax.Array:
        """The matrices [E, in, out] in `dtype`."""
        nibbles = jnp.stack([value & 15, value >> 4], -1).reshape(*value.shape[:-1], _BLOCK).astype(jnp.int32)
        exponent, mantissa = (nibbles >> 1) & 3, nibbles & 1
        large = ((2 + mantissa) << exponent).astype(jnp.float32) * 0.25
        size = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * 0.5, large)
        signed = jnp.where(nibbles >= 8, -size, size)
        power = jax.lax.bitcast_convert_type(scale.astype(jnp.int32) << 23, jnp.float32)  # 2 ** (scale - 127)
        matrix_EOI = (signed * power[..., None]).reshape(*value.shape[:2], -1)
        return matrix_EOI.swapaxes(1, 2).astype(dtype)
