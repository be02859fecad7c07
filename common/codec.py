"""What of the states and logits goes to the store, in which precision, and how it is read again.

The full-vocabulary argmax and logsumexp are always kept. With `last_hidden` and the target's output head they
are all that a teacher needs. Codecs add log-probabilities, logit - logsumexp over the full vocabulary: `none`
nothing, `topk` the largest k and their ids, `draft` those of a draft vocabulary, `full` all. With `topk`,
`last_hidden` may be left out, or be that of the first rows alone.

They are float16 (of `draft` and `full` float32 where states are), whose steps are a share of each value: p is
off by at most 0.05% of 1 - p. Of a logit of 30 it would be 0.8% of p, and the rest of the mass mere rounding.

States are stored in float32 or bfloat16, or in 8 bits with a scale a token: float8_e4m3fn, or int8, which has
a scale a channel too, found once for a store (common/channels.py). Channels of a residual stream differ in
size thousandfold; in units of their own root mean square, integers serve all alike. float8 gains nothing by
that: its steps are a share of each value.

`encode_...` make the arrays that `shapes` names; `decode` is their inverse, of NumPy and of JAX arrays.

Dimensions: R rows, B rows of a batch, T positions, A aux states, H hidden size, V vocabulary, N draft
vocabulary, k of topk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.config import FLOAT8, INT8

LOGPROBS = "_logprobs"  # how the names of arrays of log-probabilities end
_LEAST = float(np.finfo(np.float16).min)  # of a log-probability: p is 0 long before
_BLOCK = 128  # logits, or what divides it and the vocabulary
_TINY = 1e-30  # what is smaller is nothing
LARGEST = {FLOAT8: 448.0, INT8: 127.0}  # of a token's stored values; float8_e4m3fn's: arXiv 2209.05433


@dataclass(frozen=True)
class Codec:
    """What is stored. `size` is k of `topk`, N of `draft`, V of `full`, 0 of `none`; `last_rows`: of how many
    rows last_hidden is, None: of all."""

    name: str
    size: int
    precision: str
    last_rows: int | None = None

    @property
    def logprobs(self) -> tuple[str, Any] | None:
        """The name and dtype of the array of log-probabilities, [R, T, size]; None of `none`."""
        if self.name == "none":
            return None
        exact = self.precision == "float32" and self.name != "topk"
        return f"{self.name}{LOGPROBS}", np.float32 if exact else np.float16

    def states(self, A: int, H: int) -> dict[str, tuple[int, ...]]:
        """{name: shape at a position} of the states that are stored."""
        return {"aux_hidden": (A, H)} | ({} if self.last_rows == 0 else {"last_hidden": (H,)})

    def channels(self, A: int, H: int) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the states that have a scale a channel."""
        return self.states(A, H) if self.precision == INT8 else {}


def shapes(codec: Codec, R: int, T: int, A: int, H: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{name: (shape, dtype)} of the arrays that `encode_...` make, for R rows."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        "argmax": ((R, T), np.int32),
        "logsumexp": ((R, T), np.float32),
    }
    for name, shape in codec.states(A, H).items():
        rows = R if codec.last_rows is None or name == "aux_hidden" else min(R, codec.last_rows)
        found[name] = ((rows, T, *shape), jnp.dtype(codec.precision))
        if codec.precision in LARGEST:
            found[_scale_name(name)] = ((rows, T, *shape[:-1]), np.float32)
    if codec.logprobs:
        name, dtype = codec.logprobs
        found[name] = ((R, T, codec.size), dtype)
    if codec.name == "topk":
        found["topk_ids"] = ((R, T, codec.size), np.int32)
    return found


def arrays_of(precision: str, *states: str) -> tuple[str, ...]:
    """The stored arrays that hold `states` ("aux_hidden", "last_hidden"): 8 bits have scales beside them."""
    return (*states, *(_scale_name(name) for name in states if precision in LARGEST))


def _scale_name(states: str) -> str:
    return states.replace("_hidden", "_scale")


def quantise(x: jax.Array, precision: str, channel: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """(8 bits [..., H], f32 scale [...]): x = stored * scale * channel, the largest of a token's |stored| at
    the precision's largest. A token that is not finite has a scale that is not; int8 would hide it."""
    x = x.astype(jnp.float32)
    x = x if channel is None else x / _like(x, channel)
    scale = jnp.abs(x).max(-1) / LARGEST[precision]
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)  # what is smaller is 0 on a device
    x = x / scale[..., None]
    return (jnp.rint(x) if precision == INT8 else x).astype(jnp.dtype(precision)), scale


def encode_states(
    codec: Codec, aux_BTAH: jax.Array, last_BTH: jax.Array, channels: Mapping[str, jax.Array] = {}
) -> dict[str, jax.Array]:
    """The states in the codec's precision, with their scales where it has some; `channels` are those of
    `Codec.channels`, float32."""
    given, found = {"aux_hidden": aux_BTAH, "last_hidden": last_BTH}, {}
    for name in codec.states(*aux_BTAH.shape[-2:]):
        if codec.precision in LARGEST:
            of_token = _scale_name(name)
            found[name], found[of_token] = quantise(given[name], codec.precision, channels.get(name))
        else:
            found[name] = given[name].astype(jnp.dtype(codec.precision))
    return found


def square_sums(
    codec: Codec, aux_BTAH: jax.Array, last_BTH: jax.Array, inside_BT: jax.Array
) -> dict[str, jax.Array]:
    """What scales of channels are made of: the sums of squares over each row's positions that are `inside`,
    f32 [B, ...], of the states that need them, each divided by its own root mean square.

    Some tokens, a document's first ones, are hundreds of times larger than others. As they are, these few
    would decide on the scales, and the channels that they fill would be coarse in all other tokens.
    """
    given = {"aux_hidden": aux_BTAH, "last_hidden": last_BTH}
    found = {}
    for name, shape in codec.channels(*aux_BTAH.shape[-2:]).items():
        x = given[name].astype(jnp.float32)
        x = x / jnp.maximum(jnp.abs(x).max(-1, keepdims=True), _TINY)  # so that no square is too large
        squares = jnp.square(x)
        squares = squares / jnp.maximum(squares.mean(-1, keepdims=True), _TINY)
        there = inside_BT.reshape(*inside_BT.shape, *[1] * len(shape))
        found[name] = jnp.where(there, squares, 0.0).sum(1)
    return found


def decode(stored: Any, scale: Any | None = None, channel: Any | None = None) -> Any:
    """The states that were encoded, float32 where they have a scale, in the dtype of the store elsewhere.

    `stored` [..., H], `scale` [...] and `channel` [(A,) H] are NumPy or JAX arrays.
    """
    if scale is None:
        return stored
    found = stored.astype(np.float32) * scale[..., None]
    return found if channel is None else found * _like(found, channel)


def _like(x: Any, last: Any) -> Any:
    """What is of the last dimensions of `x`, such as scales of channels, with as many dimensions."""
    return last.reshape((1,) * (x.ndim - last.ndim) + last.shape)


def decode_states(arrays: Mapping[str, Any], channels: Mapping[str, Any] = {}) -> dict[str, Any]:
    """`arrays` by their stored names with every state decoded; the scales are used up and left out."""
    scales = {_scale_name(name) for name in arrays if name.endswith("_hidden")}
    return {
        name: decode(x, arrays.get(_scale_name(name)), channels.get(name)) if name.endswith("_hidden") else x
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
    total = jnp.exp(logits_BcV - largest[..., None]).sum(-1)
    return block * S + jnp.argmax(own_BcS, -1).astype(jnp.int32), largest + jnp.log(total)


def _more(logits_BcV: jax.Array, argmax_Bc: jax.Array, largest_Bc: jax.Array) -> jax.Array:
    """By how much the logsumexp is more than the largest logit. The others are summed up without the 1 of the
    largest, beside which most of what a confident target gives them would be rounded away."""
    others = _like(logits_BcV, jnp.arange(logits_BcV.shape[-1], dtype=jnp.int32)) != argmax_Bc[..., None]
    return jnp.log1p(jnp.where(others, jnp.exp(logits_BcV - largest_Bc[..., None]), 0.0).sum(-1))


def encode_logits(codec: Codec, logits_BcV: jax.Array, draft_ids_N: jax.Array | None) -> dict[str, jax.Array]:
    """Argmax (the first of equals), logsumexp, and what the codec adds, of whole distributions in f32."""
    if codec.name == "topk":
        # The barrier: where slices of top_k's result are used, XLA for CPU sorts the whole vocabulary instead
        # of selecting (jaxlib 0.10.2: 12 times the time).
        kept, ids = jax.lax.optimization_barrier(jax.lax.top_k(logits_BcV, codec.size))
        argmax, found = ids[..., 0], {"topk_ids": ids}
    else:
        argmax, logsumexp = jax.lax.platform_dependent(logits_BcV, cpu=_summed_by_block, default=_summed)
        if codec.logprobs is None:
            return {"argmax": argmax, "logsumexp": logsumexp}
        kept, found = logits_BcV, {}
        if codec.name == "draft":
            kept = jnp.take(logits_BcV, draft_ids_N, axis=-1)
    largest = kept[..., 0] if codec.name == "topk" else logits_BcV.max(-1)
    more = _more(logits_BcV, argmax, largest)
    name, dtype = codec.logprobs
    logp = (kept - largest[..., None]) - more[..., None]  # in this order not rounded to the steps of logits
    logp = jnp.clip(logp, _LEAST, 0.0).astype(dtype)
    return found | {"argmax": argmax, "logsumexp": largest + more, name: logp}
