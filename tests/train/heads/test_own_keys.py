"""Keys of one's own joined to keys that are summed up are a softmax over all of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.heads import own_keys, own_keys_tpu
from train.heads.own_keys import join

C, N, J, d, K, S = 6, 6, 2, 4, 3, 5
SCALE = 0.6


def plain(q_CNd, first, own, k):
    """Softmax attention over S keys that all indices share and the own ones of steps 1..k."""
    keys, values = (
        jnp.concatenate([jnp.broadcast_to(f[None], (C, *f.shape)), o[1 : k + 1].transpose(1, 2, 0, 3)], 2)
        for f, o in zip(first, own, strict=True)
    )
    keys, values = (jnp.repeat(x, N // J, 1) for x in (keys, values))
    p = jax.nn.softmax(jnp.einsum("cnd,cnsd->cns", q_CNd, keys) * SCALE, -1)
    return jnp.einsum("cns,cnsd->cnd", p, values)


def joined(q_CNd, first, own, k):
    keys, values = (jnp.repeat(x, N // J, 0) for x in first)
    s = jnp.einsum("cnd,nsd->cns", q_CNd, keys) * SCALE
    base = jnp.einsum("cns,nsd->cnd", jax.nn.softmax(s, -1), values)
    return in_one_row(base, jax.nn.logsumexp(s, -1), q_CNd, own, k)


def in_one_row(base_CNd, lse_CN, q_CNd, own, k):
    own = tuple(x.reshape(*x.shape[:2], -1) for x in own)
    return join(SCALE, base_CNd[None], lse_CN[None], q_CNd[None], own, jnp.int32(k)).reshape(q_CNd.shape)


@pytest.mark.parametrize("k", range(K))
def test_it_is_one_softmax_in_both_directions(k):
    rng = np.random.default_rng(k)
    q, g, *rest = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((C, N, d), (C, N, d), (J, S, d), (J, S, d), (K, C, J, d), (K, C, J, d))
    )
    results = []
    for fn in (joined, plain):
        out, pull = jax.vjp(jax.jit(lambda *args, fn=fn: fn(*args, k)), q, tuple(rest[:2]), tuple(rest[2:]))
        results.append(jax.tree.leaves((out, pull(g))))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_is_the_same_within_rounding():
    rng = np.random.default_rng(7)
    q, base, g, *own = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*[(C, N, d)] * 3, *[(K, C, J, d)] * 2)
    )
    lse = jnp.zeros((C, N))

    def all_of(dtype):
        given = [x.astype(dtype) for x in (base, q, *own)]
        out, pull = jax.vjp(lambda b, q, *own: in_one_row(b, lse, q, own, 2), *given)
        return out, *pull(g.astype(dtype))

    for found, expected in zip(all_of(jnp.bfloat16), all_of(jnp.float32), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_own_keys_of_step_0_and_of_later_steps_are_not_seen():
    rng = np.random.default_rng(0)
    q, base, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((C, N, d), (C, N, d), *[(K, C, J, d)] * 2)
    )
    lse = jnp.zeros((C, N))
    moved = [x.at[jnp.array([0, 2])].add(5.0) for x in (k, v)]
    before, after = (in_one_row(base, lse, q, own, 1) for own in ((k, v), moved))
    np.testing.assert_array_equal(before, after)


def formulas(over, given):
    """What is read, and the cotangents."""
    return own_keys._read(over, 0.1, *given[:-1]), own_keys._read_back(over, 0.1, *given)


@pytest.mark.parametrize("k", range(K))
def test_a_gpu_multiplies_all_steps_and_finds_what_a_loop_over_some_finds(k):
    rng = np.random.default_rng(k)
    shapes = ((1, C, N, d), (1, C, N), (1, C, N, d), (K, C, J * d), (K, C, J * d), (C, N * d))
    base, lse, q, keys, values, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    given = base, lse, q, (keys, values), jnp.int32(k), g
    ways = own_keys._masked, own_keys._looped
    for found, expected in zip(
        *(jax.tree.leaves(jax.jit(partial(formulas, over))(given)) for over in ways), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_on_a_gpu_no_loop_is_left_that_would_ask_the_host():
    shapes = ((1, C, N, d), (1, C, N), (1, C, N, d), (K, C, J * d), (K, C, J * d))
    base, lse, q, *own = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)

    def read(base, lse, q, keys, values, k):
        out, pull = jax.vjp(lambda *own: join(0.1, base, lse, q, own, k), keys, values)
        return pull(out)

    for platform, loops in (("cuda", False), ("cpu", True)):
        traced = jax.jit(read).trace(base, lse, q, *own, jax.ShapeDtypeStruct((), jnp.int32))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops


@pytest.mark.parametrize("k", [0, 2])
def test_the_kernels_give_what_the_formulas_give(k):
    """Run step by step on any device; the formulas compute in float32 what the kernels read in bfloat16."""
    B, m, d = 2, 2 * own_keys_tpu.BLOCK, own_keys_tpu.LANES
    rng = np.random.default_rng(k)
    base, q, keys, values, g = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        for s in ((B, m, N, d),) * 2 + ((K, B * m, J * d),) * 2 + ((B * m, N * d),)
    )
    lse = jnp.asarray(rng.normal(size=(B, m, N)), jnp.float32)
    given = base, lse, q, (keys, values), jnp.int32(k), g
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, given)
    found = (
        own_keys_tpu.read(0.1, *given[:-1], interpret=True),
        own_keys_tpu.read_back(0.1, *given, interpret=True),
    )
    expected = formulas(own_keys._looped, wide)
    for value, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert value.shape == wanted.shape
        np.testing.assert_allclose(np.asarray(value, np.float32), wanted, atol=0.02 * np.abs(wanted).max())
