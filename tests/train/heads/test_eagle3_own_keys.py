"""Keys of one's own joined to keys that are summed up are a softmax over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.heads.eagle3.own_keys import join

C, N, J, d, K, S = 6, 6, 2, 4, 3, 5
SCALE = 0.6


def plain(q_CNd, first, own, k):
    """Softmax attention over S keys that all indices share and the own ones of steps 1..k."""
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(f[None], (C, *f.shape)), o[:, :, 1 : k + 1]], 2)
        for f, o in zip(first, own, strict=True)
    )
    keys, values = (jnp.repeat(x, N // J, 1) for x in (keys, values))
    p = jax.nn.softmax(jnp.einsum("cnd,cnsd->cns", q_CNd, keys) * SCALE, -1)
    return jnp.einsum("cns,cnsd->cnd", p, values)


def joined(q_CNd, first, own, k):
    keys, values = (jnp.repeat(x, N // J, 0) for x in first)
    s = jnp.einsum("cnd,nsd->cns", q_CNd, keys) * SCALE
    base = jnp.einsum("cns,nsd->cnd", jax.nn.softmax(s, -1), values)
    return join(SCALE, base, jax.nn.logsumexp(s, -1), q_CNd, own, jnp.int32(k))


@pytest.mark.parametrize("k", range(K))
def test_it_is_one_softmax_in_both_directions(k):
    rng = np.random.default_rng(k)
    q, g, *rest = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((C, N, d), (C, N, d), (J, S, d), (J, S, d), (C, J, K, d), (C, J, K, d))
    )
    results = []
    for fn in (joined, plain):
        out, pull = jax.vjp(jax.jit(lambda *args, fn=fn: fn(*args, k)), q, tuple(rest[:2]), tuple(rest[2:]))
        results.append(jax.tree.leaves((out, pull(g))))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_own_keys_of_step_0_and_of_later_steps_are_not_seen():
    rng = np.random.default_rng(0)
    q, base, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((C, N, d), (C, N, d), *[(C, J, K, d)] * 2)
    )
    lse = jnp.zeros((C, N))
    moved = [x.at[:, :, jnp.array([0, 2])].add(5.0) for x in (k, v)]
    before, after = (join(SCALE, base, lse, q, tuple(own), jnp.int32(1)) for own in ((k, v), moved))
    np.testing.assert_array_equal(before, after)
