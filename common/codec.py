"""What of the states and logits goes to the store, in which precision, and how it is read again.

The full-vocabulary argmax and logsumexp are always kept. With `last_hidden` and the target's output head they
are all that a teacher needs. Codecs add: `none` nothing, `topk` the largest k logits and their ids, `draft`
the logits of a draft vocabulary, `full` all of them. `encode_…` make the arrays that `shapes` names; `decode`
is their inverse, of NumPy and of JAX arrays.

Dimensions: R rows, B rows of a batch, T positions, A aux states, H hidden size, V vocabulary, N draft
vocabulary, k of topk.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.config import FLOAT8

_BLOCK = 128  # logits, or what divides it and the vocabulary
FLOAT8_MAX = 448.0  # the largest of float8_e4m3fn, arXiv 2209.05433


@dataclass(frozen=True)
class Codec:
    """What is stored. `size` is k of `topk`, N of `draft`, V of `full`, 0 of `none`."""

    name: str
    size: int
    precision: str

    @property
    def logits_dtype(self) -> Any:
        """Of draft_logits and full_logits: the states' precision, but not float8, which would need scales."""
        return jnp.bfloat16 if self.precision == FLOAT8 else jnp.dtype(self.precision)


def shapes(codec: Codec, R: int, T: int, A: int, H: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of the arrays that `encode` makes, for R rows."""
    states = jnp.dtype(codec.precision)
    found = {
        "aux_hidden": ((R, T, A, H), states),
        "last_hidden": ((R, T, H), states),
        "argmax": ((R, T), np.int32),
        "logsumexp": ((R, T), np.float32),
    }
    if codec.precision == FLOAT8:
        found |= {"aux_scale": ((R, T, A), np.float32), "last_scale": ((R, T), np.float32)}
    if codec.name == "topk":
        found |= {
            f"topk_{n}": ((R, T, codec.size), t) for n, t in (("logits", np.float16), ("ids", np.int32))
        }
    if codec.name in ("draft", "full"):
        found[f"{codec.name}_logits"] = ((R, T, codec.size), codec.logits_dtype)
    return found


def arrays_of(precision: str, *states: str) -> tuple[str, ...]:
    """The stored arrays that hold `states` ("aux_hidden", "last_hidden"): float8 has scales beside them."""
    return (*states, *(_scale_name(name) for name in states if precision == FLOAT8))


def _scale_name(states: str) -> str:
    return states.replace("_hidden", "_scale")


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float8_e4m3fn [..., H], f32 scale [...]): x = stored * scale, the largest of a token at 448."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = jnp.where(largest > 0, largest / FLOAT8_MAX, 1.0)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


def encode_states(codec: Codec, aux_BTAH: jax.Array, last_BTH: jax.Array) -> dict[str, jax.Array]:
    """The states in the codec's precision, with their scales where it is float8."""
    states = {"aux_hidden": aux_BTAH, "last_hidden": last_BTH}
    if codec.precision != FLOAT8:
        return {name: x.astype(jnp.dtype(codec.precision)) for name, x in states.items()}
    stored = {name: quantise(x) for name, x in states.items()}
    return {name: x for name, (x, _) in stored.items()} | {
        _scale_name(name): scale for name, (_, scale) in stored.items()
    }


def decode(stored: Any, scale: Any | None = None) -> Any:
    """The states that were encoded, float32 where they have a scale, in the dtype of the store elsewhere.

    `stored` [..., H] and `scale` [...] are NumPy or JAX arrays.
    """
    return stored if scale is None else stored.astype(np.float32) * scale[..., None]


def decode_states(arrays: dict[str, Any]) -> dict[str, Any]:
    """`arrays` by their stored names with every state decoded; the scales are used up and left out."""
    scales = {_scale_name(name) for name in arrays if name.endswith("_hidden")}
    return {
        name: decode(x, arrays.get(_scale_name(name))) if name.endswith("_hidden") else x
        for name, x in arrays.items()
        if name not in scales
    }


def _summed(logits_BcV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first index [B, c] int32 of the largest, logsumexp [B, c]).

    XLA for TPU finds the largest while it makes the logits, and reads them once for the rest. It would read
    them twice if sum and index were two reductions.
    """
    last = logits_BcV.shape[-1] - 1
    largest = logits_BcV.max(-1)
    places = jax.lax.broadcasted_iota(jnp.int32, logits_BcV.shape, logits_BcV.ndim - 1)
    found = jnp.where(logits_BcV == largest[..., None], places, last)
    total, first = jax.lax.reduce(
        (jnp.exp(logits_BcV - largest[..., None]), found),
        (jnp.float32(0), jnp.int32(last)),
        lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1])),
        (logits_BcV.ndim - 1,),
    )
    return first, largest + jnp.log(total)


def _summed_by_block(logits_BcV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same; the index is looked for in one block of logits alone.

    XLA for CPU finds the largest in a twentieth of the time that it takes for its index (jaxlib 0.10.2).
    """
    V = logits_BcV.shape[-1]
    S = math.gcd(V, _BLOCK)
    blocks_BcbS = logits_BcV.reshape(*logits_BcV.shape[:-1], V // S, S)
    tops_Bcb = blocks_BcbS.max(-1)
    largest, block = tops_Bcb.max(-1), jnp.argmax(tops_Bcb, -1).astype(jnp.int32)
    own_BcS = jnp.take_along_axis(blocks_BcbS, block[..., None, None], -2)[..., 0, :]
    kind = jax.typeof(logits_BcV).sharding
    if not kind.mesh.empty:  # of a single row on one chip, reshaping and gathering forget where it lies
        whole = kind.update(spec=kind.spec[:-1])
        largest, block = (jax.sharding.reshard(x, whole) for x in (largest, block))
        own_BcS = jax.sharding.reshard(own_BcS, kind)
    return block * S + jnp.argmax(own_BcS, -1).astype(jnp.int32), _logsumexp(logits_BcV, largest)


def _logsumexp(logits_BcV: jax.Array, largest_Bc: jax.Array) -> jax.Array:
    return largest_Bc + jnp.log(jnp.exp(logits_BcV - largest_Bc[..., None]).sum(-1))


def encode_logits(codec: Codec, logits_BcV: jax.Array, draft_ids_N: jax.Array | None) -> dict[str, jax.Array]:
    """Argmax (the first of equals), logsumexp, and what the codec adds, of whole distributions in f32."""
    if codec.name == "topk":
        # The barrier: where slices of top_k's result are used, XLA for CPU sorts the whole vocabulary instead
        # of selecting (jaxlib 0.10.2: 12 times the time).
        top, ids = jax.lax.optimization_barrier(jax.lax.top_k(logits_BcV, codec.size))
        argmax, logsumexp = ids[..., 0], _logsumexp(logits_BcV, top[..., 0])
    else:
        argmax, logsumexp = jax.lax.platform_dependent(logits_BcV, cpu=_summed_by_block, default=_summed)
    found = {"argmax": argmax, "logsumexp": logsumexp}
    if codec.name == "topk":
        found |= {"topk_logits": top.astype(jnp.float16), "topk_ids": ids}
    elif codec.name == "draft":
        found["draft_logits"] = jnp.take(logits_BcV, draft_ids_N, axis=-1).astype(codec.logits_dtype)
    elif codec.name == "full":
        found["full_logits"] = logits_BcV.astype(codec.logits_dtype)
    return found
