"""Grouped-query attention with the variations that published models have.

Dimensions: B rows, T positions, N query heads, K key/value heads, D head_dim, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.layers import rms_norm
from dump.target.dense import add_bias, matrix, merged, must_divide, project, vector
from dump.target.heads import heads_of, rotated
from dump.target.spec import Context, Norm, Remembered, Rope, Weight


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

    def remembers(self, length: int, tokens: int) -> dict[str, Remembered]:
        """Keys and values by position."""
        return dict.fromkeys(("k", "v"), ((length, self.kv_heads, self.head_dim), None))

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        q, gate = self._queries(w, x_BTH)
        k, v = (project(w, name, x_BTH) for name in ("k_proj", "v_proj"))
        if self.row_norm:
            q = _norm_split(q, w["q_norm"], self.heads * self.head_dim, self.row_norm.eps, context)
            k = _norm_split(k, w["k_norm"], self.kv_heads * self.head_dim, self.row_norm.eps, context)
        q, k = (self._heads(x, w, name, context) for x, name in ((q, "q_norm"), (k, "k_norm")))
        v = heads_of(v, self.head_dim)
        if context.splits(self.heads) and not context.splits(self.kv_heads):
            k, v = (self._own(x, q.shape[1], context) for x in (k, v))
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = context.attend(q, k, v, self.scale, self.window, w.get("sinks"))
        if self.gated:
            out = out * jax.nn.sigmoid(heads_of(gate, self.head_dim).swapaxes(1, 2))
        y = context.total(merged(out, w["o_proj"]))
        return add_bias(w, "o_proj", y)

    def _queries(self, w: Mapping[str, jax.Array], x_BTH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The queries, and the gates if there are any; the matrix is cut, and not what it gives."""
        if not self.gated:
            return project(w, "q_proj", x_BTH), None

        def cut(x: jax.Array, part: int) -> jax.Array:
            both = x.reshape(-1, 2, self.head_dim, *x.shape[1:])
            return both[:, part].reshape(-1, *x.shape[1:])

        held = {name: w[name] for name in ("q_proj", "q_proj.bias") if name in w}
        parts = ({name: cut(x, part) for name, x in held.items()} for part in (0, 1))
        return tuple(project(part, "q_proj", x_BTH) for part in parts)

    def _heads(self, x_BTM: jax.Array, w: Mapping[str, jax.Array], name: str, context: Context) -> jax.Array:
        """Queries or keys head by head, normed and rotated."""
        norm = self.head_norm
        if self.rope:
            tables = context.tables(self.rope)
            return rotated(x_BTM, self.head_dim, tables, norm=norm, weight_D=w[name] if norm else None)
        x_BNTD = heads_of(x_BTM, self.head_dim)
        return rms_norm(x_BNTD, w[name], norm.eps, norm.offset) if norm else x_BNTD

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
