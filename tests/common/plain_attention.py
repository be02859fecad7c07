"""Attention as its formula says: all T x T logits, autodiff. Dimensions as in common/attention.py."""

import jax
import jax.numpy as jnp
import numpy as np


def plain(q, k, v, segments, scale, window=None, sinks=None, softcap=None):
    """(out, logsumexp) with all T x T logits."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("btnd,bsnd->bnts", q, k, precision="highest") * scale
    s = s if softcap is None else softcap * jnp.tanh(s / softcap)
    apart = np.arange(s.shape[-1])[:, None] - np.arange(s.shape[-1])[None]
    seen = (apart >= 0) & (apart < (window or 10**6))
    s = jnp.where((segments[:, None, :, None] == segments[:, None, None]) & seen[None, None], s, -jnp.inf)
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], -1)
    p = jax.nn.softmax(s, -1)[..., : k.shape[1]]
    lse = jax.nn.logsumexp(s, -1).transpose(0, 2, 1)
    return jnp.einsum("bnts,bsne->btne", p, v, precision="highest"), lse
