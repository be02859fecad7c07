"""Attention as its formula says: all T x T logits, autodiff. Dimensions as in common/attention.py."""

import jax
import jax.numpy as jnp
import numpy as np


def plain(q, k, v, segments, scale, window=None, sinks=None):
    """(out, logsumexp) with all T x T logits."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = jnp.einsum("btnd,bsnd->bnts", q, k, precision="highest") * scale
    apart = np.arange(s.shape[-1])[:, None] - np.arange(s.shape[-1])[None]
    seen = (apart >= 0) & (apart < (window or 10**6))
    s = jnp.where((segments[:, None, :, None] == segments[:, None, None]) & seen[None, None], s, -jnp.inf)
    if sinks is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], -1)
    p = jax.nn.softmax(s, -1)[..., : k.shape[1]]
    lse = jax.nn.logsumexp(s, -1).transpose(0, 2, 1)
    return jnp.einsum("bnts,bsne->btne", p, v, precision="highest"), lse


def made(T, N, J, d, e, options):
    """(arrays, cotangents of output and logsumexp, form, sinks); the second row ends in padding."""
    rng = np.random.default_rng(0)
    shapes = (2, T, N, d), (2, T, J, d), (2, T, J, e), (2, T, N, e)
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    g_lse = jnp.asarray(rng.normal(size=(2, T, N)), jnp.float32)
    segments = np.sort(rng.integers(1, 4, (2, T)), 1).astype(np.int32)
    segments[1, -9:] = 0
    sinks = jnp.asarray(rng.normal(size=N), jnp.bfloat16) if options.get("sinks") else None
    return (q, k, v, segments), (g, g_lse), (d**-0.5, options.get("window")), sinks


def require_formula(kernels, *shape, interpret):
    """The kernels' outputs are `plain`'s, and so are their gradients of output and logsumexp together."""
    (q, k, v, segments), (g, g_lse), form, sinks = made(*shape)
    out, lse = kernels.attend(q, k, v, segments, *form, sinks, return_lse=True, interpret=interpret)
    shift = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - g_lse
    back = kernels.pull_back(q, k, v, segments, lse, g, shift, *form, interpret=interpret)

    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wide = None if sinks is None else sinks.astype(jnp.float32)
    expected, pull = jax.vjp(lambda *x: plain(*x, segments, *form, wide), *exact)
    pulled = pull((g.astype(jnp.float32), g_lse))
    for value, wanted in zip((out, lse, *back), (*expected, *pulled), strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        assert np.abs(value - wanted).max() < 0.02 * np.abs(wanted).max()
