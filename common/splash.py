"""Attention on TPU: jax's splash kernel, which skips the blocks of keys that causality or a window hides.

Its arguments are those of common/attention.py, where the dimensions are named too. Forward only.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128  # the kernel's blocks are multiples of it
BLOCK = 512  # queries and keys at a time: scores of a block stay in fast memory


def serves(q_BTNd: jax.Array) -> bool:
    """Whether the kernel computes what is asked: its matmuls take bfloat16."""
    return q_BTNd.dtype == jnp.bfloat16


def attend(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """([B, T, N, e], logsumexp [B, T, N] if it is asked for); `interpret` runs the kernel's steps one by one,
    on any device."""
    T, N = q_BTNd.shape[1:3]
    size = -(-T // LANES) * LANES
    block = max(b for b in range(LANES, BLOCK + 1, LANES) if size % b == 0)
    if window is None or window >= T:
        mask = splash.CausalMask((size, size))
    else:
        mask = splash.LocalMask((size, size), (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        attn_logits_soft_cap=softcap,
        save_residuals=return_lse,
        interpret=interpret,
    )

    def row(q_TNd, k_TJd, v_TJe, segments_T) -> tuple[jax.Array, jax.Array | None]:
        # What is filled in lies behind all documents: no query of theirs sees it.
        q, k, v = (jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, size - T), (0, 0))) for x in (q_TNd, k_TJd, v_TJe))
        segments = jnp.pad(segments_T, (0, size - T), constant_values=-1)
        found = kernel(q, k, v, splash.SegmentIds(segments, segments), sinks=sinks_N)
        out_NTe, (lse_NT,) = found if return_lse else (found, (None,))
        return out_NTe[:, :T].swapaxes(0, 1), lse_NT[:, :T].T if return_lse else None

    return jax.vmap(row)(q_BTNd * jnp.asarray(scale, q_BTNd.dtype), k_BTJd, v_BTJe, segments_BT)
