"""Multi-head latent attention: keys and values are expanded from a small latent that all heads share.

Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1); behaviour: transformers `models/deepseek_v3`.

Dimensions: B rows, T positions, N heads, C latent width, P unrotated and R rotated dimensions of a query
or key, E dimensions of a value, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.attention import attend
from common.cached_attention import attend_to_cache
from common.layers import apply_rope, einsum, linear, rms_norm
from dump.target.dense import add_bias, matrix, merged, must_divide, project, vector
from dump.target.heads import heads_of, rotated
from dump.target.remembering import Past, Remembering
from dump.target.spec import Context, Remembered, Rope, Weight

_LATENT_EPS = 1e-6  # of the latents' norms, whatever the model's rms_norm_eps is


@dataclass(frozen=True)
class Mla:
    """`query_rank`: width of the queries' own latent; None: queries come straight from x.

    `interleaved`: rotated dimensions are paired (0, 1), (2, 3), … in the checkpoint.
    """

    hidden: int
    heads: int
    query_rank: int | None
    latent: int
    plain_dim: int
    rope: Rope
    value_dim: int
    scale: float
    interleaved: bool = True
    bias: bool = False

    def weights(self, tp: int) -> dict[str, Weight]:
        must_divide(tp, self.heads, "attention heads")
        H, N, C, R = self.hidden, self.heads, self.latent, self.rope.dim
        head = self.plain_dim + R
        heads, whole = ("heads", None), (None, None)
        declared = (
            matrix("self_attn.kv_a_proj_with_mqa", C + R, H, whole, self.bias)
            | vector("self_attn.kv_a_layernorm", C)
            | matrix("self_attn.kv_b_proj", N * (self.plain_dim + self.value_dim), C, heads)
            | matrix("self_attn.o_proj", H, N * self.value_dim, (None, "heads"), self.bias)
        )
        if self.query_rank is None:
            return declared | matrix("self_attn.q_proj", N * head, H, heads)
        return (
            declared
            | matrix("self_attn.q_a_proj", self.query_rank, H, whole, self.bias)
            | vector("self_attn.q_a_layernorm", self.query_rank)
            | matrix("self_attn.q_b_proj", N * head, self.query_rank, heads)
        )

    def flops(self, length: int) -> float:
        """Of scores and values, a token of documents of `length`."""
        width = self.plain_dim + self.rope.dim + self.value_dim
        return 2.0 * self.heads * width * (length + 1) / 2

    def remembers(self, length: int, tokens: int) -> dict[str, Remembered]:
        """The latent and the shared rotated dimensions, by position."""
        return {"latent": ((length, self.latent + self.rope.dim), None)}

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        P, R = self.plain_dim, self.rope.dim
        tables = context.tables(self.rope)
        q = rotated(self._queries(w, x_BTH), P + R, tables, start=P)
        latent = project(w, "kv_a_proj_with_mqa", x_BTH)
        c_BTC = rms_norm(latent[..., : self.latent], w["kv_a_layernorm"], _LATENT_EPS)
        shared_BT1R = apply_rope(latent[:, :, None, self.latent :], tables, self.interleaved)
        # Matrices are cut and put together, and not what they give, which is far larger.
        w_NXC = w["kv_b_proj"].reshape(-1, P + self.value_dim, self.latent)
        w_k = _with_shared(w_NXC[:, :P], R).reshape(-1, self.latent + R)
        w_v = w_NXC[:, P:].reshape(-1, self.latent)
        latent_BTX = jnp.concatenate([c_BTC, shared_BT1R[:, :, 0]], -1)
        past = context.remember("latent", latent_BTX) if context.cache else None
        if past is not None:
            out = self._over_latents(q.swapaxes(1, 2), past, w_NXC, context)
            return add_bias(w, "o_proj", context.total(merged(out, w["o_proj"])))
        # The scale belongs to queries times keys: here it multiplies the least.
        shared = latent_BTX.astype(jnp.float32) * self.scale
        k = heads_of(linear(shared.astype(c_BTC.dtype), w_k), P + R)
        v = heads_of(linear(c_BTC, w_v), self.value_dim)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = attend(q, k, v, context.segments_BT, 1.0)
        return add_bias(w, "o_proj", context.total(merged(out, w["o_proj"])))

    def _over_latents(
        self, q_BmNX: jax.Array, past: Past, w_NXC: jax.Array, context: Remembering
    ) -> jax.Array:
        """The heads' results [B, m, N, E] without expanding the cache: the matrices of keys and of values are
        applied to queries and results (arXiv 2405.04434, section 2.1.2)."""
        P, C = self.plain_dim, self.latent
        q_BmNC = einsum("bmnp,npc->bmnc", q_BmNX[..., :P], w_NXC[:, :P]).astype(q_BmNX.dtype)
        q_BmNX = jnp.concatenate([q_BmNC, q_BmNX[..., P:]], -1)

        def read(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
            latent_BS1X = past(start, size)[:, :, None]
            return latent_BS1X, latent_BS1X[..., :C]

        length = context.cache["latent"].shape[2]
        mixed_BmNC = attend_to_cache(q_BmNX, read, length, context.new, self.scale)
        return einsum("bmnc,nec->bmne", mixed_BmNC, w_NXC[:, P:]).astype(mixed_BmNC.dtype)

    def _queries(self, w: Mapping[str, jax.Array], x_BTH: jax.Array) -> jax.Array:
        """[B, T, N * (P + R)], the rotated dimensions paired as halves."""
        if self.query_rank is None:
            return linear(x_BTH, self._in_halves(w["q_proj"]))
        latent = rms_norm(project(w, "q_a_proj", x_BTH), w["q_a_layernorm"], _LATENT_EPS)
        return linear(latent, self._in_halves(w["q_b_proj"]))

    def _in_halves(self, w_MI: jax.Array) -> jax.Array:
        """A matrix that gives queries, its rotated outputs in the order in which the keys' come."""
        if not self.interleaved:
            return w_MI
        w_NXI = w_MI.reshape(-1, self.plain_dim + self.rope.dim, w_MI.shape[-1])
        plain, turned = w_NXI[:, : self.plain_dim], w_NXI[:, self.plain_dim :]
        return jnp.concatenate([plain, turned[:, ::2], turned[:, 1::2]], 1).reshape(w_MI.shape)


def _with_shared(w_NPC: jax.Array, R: int) -> jax.Array:
    """[N, P + R, C + R]: gives every head's plain dimensions from the latent and copies the shared ones
    behind it."""
    N, _, C = w_NPC.shape
    plain = jnp.pad(w_NPC, ((0, 0), (0, 0), (0, R)))
    copied = jnp.pad(jnp.eye(R, dtype=w_NPC.dtype), ((0, 0), (C, 0)))
    return jnp.concatenate([plain, jnp.broadcast_to(copied[None], (N, *copied.shape))], 1)
