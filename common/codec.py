"""What of the states and logits goes to the store, and in which precision.

The full-vocabulary argmax and logsumexp are always kept. Codecs add: `topk` the largest k logits and their
ids, `draft` the logits of a draft vocabulary, `full` all of them, `none` nothing.

Dimensions: R rows, B rows of a batch, T positions, A aux states, H hidden size, V vocabulary, N draft
vocabulary, k of topk.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CODECS = ("topk", "draft", "full", "none")
PRECISIONS = ("float32", "bfloat16", "float8_e4m3fn")
FLOAT8_MAX = 448.0  # the largest float8_e4m3fn, arXiv 2209.05433


@dataclass(frozen=True)
class Codec:
    """What is stored. `size` is k of `topk`, N of `draft`, V of `full`, 0 of `none`."""

    name: str
    size: int
    precision: str

    @property
    def logits_dtype(self) -> Any:
        """Of draft_logits and full_logits: the states' precision, but not float8, which would need scales."""
        return jnp.bfloat16 if self.precision == "float8_e4m3fn" else jnp.dtype(self.precision)


def shapes(codec: Codec, R: int, T: int, A: int, H: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of the arrays that `encode` makes, for R rows."""
    states = jnp.dtype(codec.precision)
    found = {
        "aux_hidden": ((R, T, A, H), states),
        "last_hidden": ((R, T, H), states),
        "argmax": ((R, T), np.int32),
        "logsumexp": ((R, T), np.float32),
    }
    if codec.precision == "float8_e4m3fn":
        found |= {"aux_scale": ((R, T, A), np.float32), "last_scale": ((R, T), np.float32)}
    if codec.name == "topk":
        found |= {
            f"topk_{n}": ((R, T, codec.size), t) for n, t in (("logits", np.float16), ("ids", np.int32))
        }
    if codec.name in ("draft", "full"):
        found[f"{codec.name}_logits"] = ((R, T, codec.size), codec.logits_dtype)
    return found


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float8_e4m3fn [..., H], f32 scale [...]): x = stored * scale, the largest of a token at 448."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = jnp.where(largest > 0, largest / FLOAT8_MAX, 1.0)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


def encode_states(codec: Codec, aux_BTAH: jax.Array, last_BTH: jax.Array) -> dict[str, jax.Array]:
    """The states in the codec's precision, with their scales where it is float8."""
    if codec.precision == "float8_e4m3fn":
        (aux, aux_scale), (last, last_scale) = quantise(aux_BTAH), quantise(last_BTH)
        return {"aux_hidden": aux, "last_hidden": last, "aux_scale": aux_scale, "last_scale": last_scale}
    dtype = jnp.dtype(codec.precision)
    return {"aux_hidden": aux_BTAH.astype(dtype), "last_hidden": last_BTH.astype(dtype)}
