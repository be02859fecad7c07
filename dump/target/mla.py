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
from common.layers import apply_rope, linear, rms_norm
from dump.target.dense import add_bias, heads_of, matrix, merged, must_divide, project, vector
from dump.target.spec import Context, Rope, Weight

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

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        tables = context.tables(self.rope)
        q = heads_of(self._queries(w, x_BTH), self.plain_dim + self.rope.dim)
        latent = project(w, "kv_a_proj_with_mqa", x_BTH)
        c_BTC = rms_norm(latent[..., : self.latent], w["kv_a_layernorm"], _LATENT_EPS)
        shared_B1TR = apply_rope(latent[:, None, :, self.latent :], tables, self.interleaved, heads=1)
        # The matrix is cut, and not what it gives, which is far larger.
        w_NXC = w["kv_b_proj"].reshape(-1, self.plain_dim + self.value_dim, self.latent)
        w_k, w_v = (part.reshape(-1, self.latent) for part in jnp.split(w_NXC, [self.plain_dim], 1))
        k, v = heads_of(linear(c_BTC, w_k), self.plain_dim), heads_of(linear(c_BTC, w_v), self.value_dim)
        k = jnp.concatenate([k, jnp.broadcast_to(shared_B1TR, (*k.shape[:3], self.rope.dim))], -1)
        q_rotated = apply_rope(q[..., self.plain_dim :], tables, self.interleaved, heads=1)
        q = jnp.concatenate([q[..., : self.plain_dim], q_rotated], -1)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        out = attend(q, k, v, context.segments_BT, self.scale)
        return add_bias(w, "o_proj", context.total(merged(out, w["o_proj"])))

    def _queries(self, w: Mapping[str, jax.Array], x_BTH: jax.Array) -> jax.Array:
        if self.query_rank is None:
            return linear(x_BTH, w["q_proj"])
        latent = rms_norm(project(w, "q_a_proj", x_BTH), w["q_a_layernorm"], _LATENT_EPS)
        return linear(latent, w["q_b_proj"])
