"""Grouped-query attention with the variations that published models have.

Dimensions: B rows, T positions, N query heads, K key/value heads, D head_dim, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.attention import attend
from common.layers import apply_rope, rms_norm
from dump.target.dense import add_bias, heads_of, matrix, merged, must_divide, project, vector
from dump.target.spec import Context, Norm, Rope, Weight


@dataclass(frozen=True)
class Gqa:
    """softmax(scale * q k) v over heads that share keys and values in groups.

    `window`: keys that a query sees, its own included. `head_norm`: RMS norm of every head of q and k.
    `row_norm`: RMS norm over all heads of q, and of k, together. `sinks`: a learned logit a head that takes
    part in the softmax and has no value. `gated`: q_proj also gives a gate for every head's output.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    scale: float
    window: int | None = None
    bias: bool = False
    out_bias: bool = False
    head_norm: Norm | None = None
    row_norm: Norm | None = None
    sinks: bool = False
    gated: bool = False

    def weights(self, tp: int) -> dict[str, Weight]:
        must_divide(tp, self.heads, "attention heads")
        H, D = self.hidden, self.head_dim
        kv = ("kv_heads" if self.kv_heads % tp == 0 else None, None)
        declared = (
            matrix("self_attn.q_proj", self.heads * D * (1 + self.gated), H, ("heads", None), self.bias)
            | matrix("self_attn.k_proj", self.kv_heads * D, H, kv, self.bias)
            | matrix("self_attn.v_proj", self.kv_heads * D, H, kv, self.bias)
            | matrix("self_attn.o_proj", H, self.heads * D, (None, "heads"), self.out_bias)
        )
        if self.head_norm:
            declared |= vector("self_attn.q_norm", D) | vector("self_attn.k_norm", D)
        if self.row_norm:
            declared |= vector("self_attn.q_norm", self.heads * D, "heads")
            declared |= vector("self_attn.k_norm", self.kv_heads * D, kv[0])
        if self.sinks:
            declared["sinks"] = Weight("layers.{layer}.self_attn.sinks", (self.heads,), ("heads",))
        return declared

    def flops(self, length: int) -> float:
        """Of scores and values, a token of documents of `length`."""
        seen = min(self.window or length, length)
        pairs = seen * (seen + 1) / 2 + (length - seen) * seen
        return 4.0 * self.heads * self.head_dim * pairs / length

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        q, k, v = (project(w, name, x_BTH) for name in ("q_proj", "k_proj", "v_proj"))
        if self.row_norm:
            q = _norm_split(q, w["q_norm"], self.heads * self.head_dim, self.row_norm.eps, context)
            k = _norm_split(k, w["k_norm"], self.kv_heads * self.head_dim, self.row_norm.eps, context)
        q, k, v = (heads_of(x, self.head_dim) for x in (q, k, v))
        if self.gated:
            q, gate = q[:, ::2], q[:, 1::2]
        if self.head_norm:
            q = rms_norm(q, w["q_norm"], self.head_norm.eps, self.head_norm.offset)
            k = rms_norm(k, w["k_norm"], self.head_norm.eps, self.head_norm.offset)
        if self.rope:
            tables = context.tables(self.rope)
            q, k = apply_rope(q, tables, heads=1), apply_rope(k, tables, heads=1)
        if context.splits(self.heads) and not context.splits(self.kv_heads):
            k, v = (self._own(x, q.shape[1], context) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = attend(q, k, v, context.segments_BT, self.scale, self.window, w.get("sinks"))
        if self.gated:
            out = out * jax.nn.sigmoid(gate.swapaxes(1, 2))
        y = context.total(merged(out, w["o_proj"]))
        return add_bias(w, "o_proj", y)

    def _own(self, kv_BKTD: jax.Array, ours: int, context: Context) -> jax.Array:
        """The key or value heads of our `ours` query heads, where every chip computed all of them."""
        heads = context.chip() * ours + jnp.arange(ours)
        return jnp.take(kv_BKTD, heads // (self.heads // self.kv_heads), axis=1)


def _norm_split(x_BTM: jax.Array, weight_M: jax.Array, width: int, eps: float, context: Context) -> jax.Array:
    """RMS norm over `width` dimensions, of which this chip may hold a part only."""
    x = x_BTM.astype(jnp.float32)
    squares = jnp.sum(x * x, -1, keepdims=True)
    if x_BTM.shape[-1] < width:
        squares = context.total(squares)
    y = x * jax.lax.rsqrt(squares / width + eps) * weight_M.astype(jnp.float32)[None, None]
    return y.astype(x_BTM.dtype)
