"""Attention in blocks is the plain formula, forwards and backwards, and holds nothing of T x T."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import attention
from tests.common.plain_attention import plain

B, T, N, J, KEY, VALUE = 2, 43, 6, 2, 8, 6
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, sinks = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, T, N, KEY), (B, T, J, KEY), (B, T, J, VALUE), (N,))
    )
    segments = np.zeros((B, T), np.int32)
    for row, ends in enumerate(([1, 3, 9, 30, 38], [17, 18, T])):  # the first row ends in padding
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            segments[row, start:end] = number
    return q, k, v, sinks, jnp.asarray(segments)


FORMS = [{}, {"window": 1}, {"window": 5}, {"window": 20}, {"sinks": True}, {"window": 11, "sinks": True}]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_the_plain_formula_in_both_directions(form):
    q, k, v, sinks, segments = inputs()
    options = form | {"sinks": sinks if form.get("sinks") else None}
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, N, VALUE), (B, T, N))]

    def ours(q, k, v, sinks, **other):
        return attention.attend(q, k, v, segments, SCALE, sinks_N=sinks, return_lse=True, **other)

    def theirs(q, k, v, sinks, **other):
        return plain(q, k, v, segments, SCALE, sinks=sinks, **other)

    results = []
    for fn in (ours, theirs):

        def loss(q, k, v, sinks, fn=fn):
            out = fn(q, k, v, sinks, **{n: x for n, x in options.items() if n != "sinks"})
            return sum((x * w).sum() for x, w in zip(out, weights, strict=True)), out

        wanted = (0, 1, 2, 3) if form.get("sinks") else (0, 1, 2)
        gradients, out = jax.grad(loss, wanted, has_aux=True)(q, k, v, options["sinks"])
        results.append((*out, *gradients))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_without_the_logsumexp_it_is_the_output_alone():
    q, k, v, _, segments = inputs()
    alone = attention.attend(q, k, v, segments, SCALE)
    both = attention.attend(q, k, v, segments, SCALE, return_lse=True)
    np.testing.assert_array_equal(alone, both[0])


@pytest.mark.parametrize("name", ["tokens of a later document", "tokens of an earlier document"])
def test_other_documents_change_no_bit(name):
    q, k, v, _, segments = inputs()
    inside = np.asarray(segments == 4)[0]
    others = (
        np.asarray(segments > 4)[0] if "later" in name else np.asarray((segments < 4) & (segments > 0))[0]
    )
    moved = [jnp.where(others[None, :, None, None], x + 3, x) for x in (q, k, v)]
    before, after = (attention.attend(*x, segments, SCALE)[0] for x in ((q, k, v), moved))
    np.testing.assert_array_equal(before[inside], after[inside])
    assert (before[others] != after[others]).any()


def test_memory_grows_with_the_length_and_not_its_square(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 64)

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

        def loss(q, k, v, segments):
            out, lse = attention.attend(q, k, v, segments, SCALE, return_lse=True)
            return (out**2).sum() + lse.sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 4.5 * temporaries(1024)
