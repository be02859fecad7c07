"""Attention on TPU: jax's splash kernels, which skip the blocks of keys that causality or a window hides.

Arguments are those of common/attention.py, where the dimensions are named too. jax's own wrapper of the
backward kernels takes no cotangent of the logsumexp, so they are called here as that wrapper calls them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from common.layers import MASKED

LANES = 128  # the kernel's blocks are multiples of it
BLOCK = 512  # queries and keys at a time: scores of a block stay in fast memory


def serves(q_BTNd: jax.Array, v_BTJe: jax.Array) -> bool:
    """Whether the kernel computes what is asked: its matmuls take bfloat16."""
    del v_BTJe
    return q_BTNd.dtype == jnp.bfloat16


def attend(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    scale: float,
    window: int | None = None,
    sinks_N: jax.Array | None = None,
    return_lse: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """([B, T, N, e], logsumexp [B, T, N] if it is asked for); `interpret` runs the kernel's steps one by one,
    on any device."""
    T, N = q_BTNd.shape[1:3]
    kernel = _kernel(T, N, window, interpret, save_residuals=return_lse)

    def row(q_TNd, k_TJd, v_TJe, segments_T) -> tuple[jax.Array, jax.Array | None]:
        q, k, v = (_heads_first(x) for x in (q_TNd, k_TJd, v_TJe))
        found = kernel(q, k, v, _segments(segments_T), sinks=sinks_N)
        out_NTe, (lse_NT,) = found if return_lse else (found, (None,))
        return _heads_last(out_NTe, T), lse_NT[:, :T].T if return_lse else None

    return jax.vmap(row)(q_BTNd, _scaled(k_BTJd, scale), v_BTJe, segments_BT)


def pull_back(
    q_BTNd: jax.Array,
    k_BTJd: jax.Array,
    v_BTJe: jax.Array,
    segments_BT: jax.Array,
    lse_BTN: jax.Array,
    g_BTNe: jax.Array,
    shift_BTN: jax.Array,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The cotangents of q, k and v. `lse` as `attend` gives it, with sinks in it if there are any; `shift` is
    sum(out * d out) - d lse."""
    T, N = q_BTNd.shape[1:3]
    kernel = _kernel(T, N, window, interpret)
    blocks = dict.fromkeys(("bq", "bkv"), kernel.kwargs["block_sizes"].block_q)
    same = {name: kernel.kwargs[name] for name in ("is_mqa", "mask_value", "mask_function", "interpret")}
    same |= dict.fromkeys(("q_layout", "k_layout", "v_layout"), kernels.QKVLayout.HEAD_DIM_MINOR)
    same |= blocks | {"attn_logits_soft_cap": None}

    def row(q_TNd, k_TJd, v_TJe, segments_T, lse_TN, g_TNe, shift_TN):
        q, k, v, g = (_heads_first(x) for x in (q_TNd, k_TJd, v_TJe, g_TNe))
        lse, shift = (
            jnp.pad(x.T, ((0, 0), (0, q.shape[1] - T)), constant_values=fill)
            for x, fill in ((lse_TN, -MASKED), (shift_TN, 0.0))  # what is filled in gives nothing back
        )
        given = q, k, v, _segments(segments_T), None, lse, g, shift
        dq = kernels._splash_attention_bwd_dq(*given, mask_info=kernel.dq_mask_info, **same)
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *given,
            mask_info=kernel.dkv_mask_info,
            bkv_compute=blocks["bkv"],
            use_fused_bwd_kernel=False,
            **same,
        )
        return tuple(_heads_last(x, T) for x in (dq, dk, dv))

    rows = q_BTNd, _scaled(k_BTJd, scale), v_BTJe, segments_BT, lse_BTN, g_BTNe, shift_BTN
    dq, dk, dv = jax.vmap(row)(*rows)
    return dq, _scaled(dk, scale), dv


def _size(T: int) -> int:
    """Positions that the kernels see."""
    return -(-T // LANES) * LANES


def _kernel(
    T: int, N: int, window: int | None, interpret: bool, **options: Any
) -> kernels.SplashAttentionKernel:
    size = _size(T)
    block = max(b for b in range(LANES, BLOCK + 1, LANES) if size % b == 0)
    if window is None or window >= T:
        mask = splash.CausalMask((size, size))
    else:
        mask = splash.LocalMask((size, size), (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        interpret=interpret,
        **options,
    )


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """Of the keys, which are fewer than the queries.

    In float32: a rounded scale would sharpen, or flatten, all of the softmax alike.
    """
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _heads_first(x_TNd: jax.Array) -> jax.Array:
    """[N, size, d]; what is filled in lies behind all documents: no query of theirs sees it."""
    T = len(x_TNd)
    return jnp.pad(x_TNd.swapaxes(0, 1), ((0, 0), (0, _size(T) - T), (0, 0)))


def _heads_last(x_NTd: jax.Array, T: int) -> jax.Array:
    return x_NTd[:, :T].swapaxes(0, 1)


def _segments(segments_T: jax.Array) -> splash.SegmentIds:
    T = len(segments_T)
    segments = jnp.pad(segments_T, (0, _size(T) - T), constant_values=-1)
    return splash.SegmentIds(segments, segments)
