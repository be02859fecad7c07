"""Attention to a cache: against all logits at once, and alone as beside others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import cached_attention
from common.cached_attention import New, Tree, attend_to_cache

B, M, N, J, D, E, LENGTH = 3, 2, 4, 2, 8, 5, 21
SCALE = 0.4
STARTS = np.array([18, 0, 7], np.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_attention, "BLOCK", 4)


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((B, M, N, D), (B, LENGTH, J, D), (B, LENGTH, J, E))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def attended(q, k, v, starts, tree=None, **form):
    def read(start, size):
        return tuple(jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, 1) for x in (k, v))

    new = New.behind(jnp.asarray(starts), q.shape[1]) if tree is None else tree
    return np.asarray(attend_to_cache(jnp.asarray(q), read, LENGTH, new, SCALE, **form))


def plain(q, k, v, starts, window=None, sinks_N=None):
    out = np.zeros((B, M, N, E))
    for b, i, n in np.ndindex(B, M, N):
        position = starts[b] + i
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        logits = SCALE * k[b, seen, n // (N // J)].astype(np.float64) @ q[b, i, n]
        weights = np.exp(logits)
        total = weights.sum() + (0 if sinks_N is None else np.exp(sinks_N[n]))
        out[b, i, n] = weights @ v[b, seen, n // (N // J)] / total
    return out


@pytest.mark.parametrize("form", [{}, {"window": 5}, {"sinks_N": np.array([0.5, -1, 2, 0], np.float32)}])
def test_it_is_attention_to_what_came_before(form):
    given = arrays()
    found = attended(*given, STARTS, **{n: jnp.asarray(x) if n == "sinks_N" else x for n, x in form.items()})
    np.testing.assert_allclose(found, plain(*given, STARTS, **form), rtol=1e-5, atol=1e-5)


def test_a_sequence_gets_the_same_bits_whatever_stands_beside_it():
    q, k, v = arrays()
    together = attended(q, k, v, STARTS, window=6)
    others = np.where(np.arange(B) == 2, STARTS, 0).astype(np.int32)
    np.testing.assert_array_equal(attended(q, k, v, others, window=6)[2], together[2])


@pytest.mark.parametrize("window", [None, 4])
def test_a_branch_of_a_tree_gets_what_it_gets_alone(window):
    """A root with two branches of two: each place sees those that lead to it, wherever the others lie."""
    rng = np.random.default_rng(1)
    starts, parents = np.array([14, 0, 7], np.int32), (0, 0, 0, 2, 1)
    nodes = len(parents)
    q, k, v = rng.normal(size=(B, nodes, N, D)), *(rng.normal(size=(B, LENGTH, J, x)) for x in (D, E))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    paths = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 1, 4]]
    sees = np.array([[node in path for node in range(nodes)] for path in paths])
    depths = np.repeat([[len(path) - 1 for path in paths]], B, 0).astype(np.int32)
    places = starts[:, None] + np.arange(nodes, dtype=np.int32)
    tree = Tree(jnp.asarray(starts), jnp.asarray(depths), jnp.repeat(jnp.asarray(sees)[None], B, 0))
    new = New(jnp.asarray(starts[:, None] + depths), jnp.asarray(places), tree)
    found = attended(q, k, v, starts, new, window=window)
    for node, path in enumerate(paths):
        moved = [x.copy() for x in (k, v)]
        for at, place in enumerate(path):
            for x, y in zip(moved, (k, v), strict=True):
                x[np.arange(B), starts + at] = y[np.arange(B), starts + place]
        alone = attended(q[:, node : node + 1], *moved, starts + len(path) - 1, window=window)
        np.testing.assert_allclose(found[:, node], alone[:, 0], rtol=1e-5, atol=1e-6)
