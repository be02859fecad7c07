"""TTT as one would write it down at first: every position at every step, every logit held, autodiff.

The measure for the trainer's speed and memory; it must give the same loss. Dimensions as in train/batch.py,
N query and J key/value heads, d head_dim, S keys.
"""

import jax
import jax.numpy as jnp

from common.layers import apply_rope, linear, rms_norm, rope_tables
from common.rope import inverse_frequencies
from train.batch import Batch, Frozen, Params
from train.heads.eagle3.head import Eagle3


def _shift(x_BT: jax.Array, by: int) -> jax.Array:
    """x[i + by] at i, 0 beyond the row."""
    rest = (0,) * (x_BT.ndim - 2)
    return jnp.pad(x_BT[:, by:], ((0, 0), (0, by), *((r, r) for r in rest)))


def _attend(q_BTNd, keys, values, mask_BTS, scale: float) -> jax.Array:
    """Softmax over the keys of step 0 that the mask shows and the own ones of later steps."""
    s = jnp.einsum("btnd,bsnd->bnts", q_BTNd, keys[0]) * scale
    s = jnp.where(mask_BTS[:, None], s, -1e30)
    own = [jnp.einsum("btnd,btnd->bnt", q_BTNd, k)[..., None] * scale for k in keys[1:]]
    p = jax.nn.softmax(jnp.concatenate([s, *own], -1), -1)
    T = s.shape[-1]
    out = jnp.einsum("bnts,bsnd->btnd", p[..., :T], values[0])
    for number, v in enumerate(values[1:]):
        out += jnp.moveaxis(p[..., T + number], 1, 2)[..., None] * v
    return out


def loss(c: Eagle3, params: Params, frozen: Frozen, batch: Batch, mask_BT: jax.Array, weight_K) -> jax.Array:
    """sum_k weight_k * (sum of step k's cross entropies); `mask_BT` bool marks the target positions.

    `batch` is read for tokens, segment_ids, positions, aux_hidden, last_hidden and argmax.
    """
    B, T = batch.tokens.shape
    J, N, d = c.num_kv_heads, c.num_heads, c.head_dim
    inverse, factor = inverse_frequencies(d, c.rope_theta, c.rope)
    attention = "midlayer.self_attn."
    segments = batch.segment_ids
    see = (segments[:, :, None] == segments[:, None]) & jnp.tri(T, dtype=bool)[None]
    teacher_BTV = batch.last_hidden @ frozen.lm_head.T
    p_BTV = jax.nn.softmax(teacher_BTV, -1)
    taught = mask_BT & (frozen.draft_index[batch.argmax] >= 0)
    state = batch.aux_hidden.reshape(B, T, -1) @ params["fc.weight"].T
    keys, values, total = [], [], 0.0
    for step in range(weight_K.shape[0]):
        embedded = frozen.embed[_shift(batch.tokens, 1 + step)]
        x = jnp.concatenate(
            [
                rms_norm(embedded, params["midlayer.input_layernorm.weight"], c.rms_eps),
                rms_norm(state, params["midlayer.hidden_norm.weight"], c.rms_eps),
            ],
            -1,
        )
        q, k, v = ((x @ params[f"{attention}{n}_proj.weight"].T).reshape(B, T, -1, d) for n in "qkv")
        tables = rope_tables(batch.positions + step, inverse, factor)
        keys.append(jnp.repeat(apply_rope(k, tables), N // J, axis=2))
        values.append(jnp.repeat(v, N // J, axis=2))
        mixed = _attend(apply_rope(q, tables), keys, values, see, d**-0.5).reshape(B, T, N * d)
        state += mixed @ params[f"{attention}o_proj.weight"].T
        wide = rms_norm(state, params["midlayer.post_attention_layernorm.weight"], c.rms_eps)
        gate, up, down = (params[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        state += linear(jax.nn.silu(linear(wide, gate)) * linear(wide, up), down)
        logits_BTV = rms_norm(state, params["norm.weight"], c.rms_eps) @ params["lm_head.weight"].T
        entropy_BT = -(_shift(p_BTV, 1 + step) * jax.nn.log_softmax(logits_BTV, -1)).sum(-1)
        counts = _shift(taught, 1 + step) & (_shift(segments, 1 + step) == segments)
        total += weight_K[step] * jnp.where(counts, entropy_BT, 0.0).sum()
    return total
