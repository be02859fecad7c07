"""What of the states and logits goes to the store, and in which precision.

The full-vocabulary argmax and logsumexp are always kept. Codecs add: `topk` the largest k logits and their
ids, `draft` the logits of a draft vocabulary, `full` all of them, `none` nothing. Logits are made and reduced
a few positions at a time, so that [B, T, V] in f32 is never held.

Dimensions: R rows, B rows of a batch, T positions, c positions of a chunk, A aux states, H hidden size,
V vocabulary, N draft vocabulary, k of topk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CODECS = ("topk", "draft", "full", "none")
PRECISIONS = ("float32", "bfloat16", "float8_e4m3fn")
FLOAT8_MAX = 448.0  # the largest float8_e4m3fn, arXiv 2209.05433
CHUNK_BYTES = 64 << 20  # of f32 logits a device holds at a time

Logits = Callable[[jax.Array], jax.Array]  # [..., H] -> f32 [..., V]


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


def chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """Positions whose logits are held at once: equal parts of `length` that fit CHUNK_BYTES."""
    fits = max(1, CHUNK_BYTES // (rows * vocab_size * 4))
    return -(-length // -(-length // fits))


def encode_logits(
    codec: Codec, logits: Logits, last_BTH: jax.Array, draft_ids_N: jax.Array | None, chunk: int
) -> dict[str, jax.Array]:
    """Argmax, logsumexp and what the codec adds, [B, T, ...]; `chunk` positions at a time.

    `logits` also decides where its result lies on the mesh (whole distributions, split by row). The argmax is
    the first of equals, as `jax.lax.top_k` and `numpy.argmax` have it.
    """
    B, T, H = last_BTH.shape
    whole_BTH = jnp.pad(last_BTH, ((0, 0), (0, -T % chunk), (0, 0)))
    last_nBcH = jnp.moveaxis(whole_BTH.reshape(B, -1, chunk, H), 1, 0)
    found = jax.lax.map(lambda last_BcH: _reduce(codec, logits(last_BcH), draft_ids_N), last_nBcH)
    return {n: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for n, x in found.items()}


def _reduce(codec: Codec, logits_BcV: jax.Array, draft_ids_N: jax.Array | None) -> dict[str, jax.Array]:
    # The barrier: where slices of top_k's result are used, XLA for CPU sorts the whole vocabulary instead of
    # selecting (jaxlib 0.10.2: 12 times the time).
    found = jax.lax.top_k(logits_BcV, codec.size if codec.name == "topk" else 1)
    top, ids = jax.lax.optimization_barrier(found)
    largest = top[..., 0]
    found = {
        "argmax": ids[..., 0],
        "logsumexp": largest + jnp.log(jnp.exp(logits_BcV - largest[..., None]).sum(-1)),
    }
    if codec.name == "topk":
        found |= {"topk_logits": top.astype(jnp.float16), "topk_ids": ids}
    elif codec.name == "draft":
        found["draft_logits"] = jnp.take(logits_BcV, draft_ids_N, axis=-1).astype(codec.logits_dtype)
    elif codec.name == "full":
        found["full_logits"] = logits_BcV.astype(codec.logits_dtype)
    return found
