"""A head that drafts with a cache gives what the reference's rollout gives, at every index and step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import cached_attention
from common.cached_attention import New
from tests.train.problem import problem

ALL = {"layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}
STEPS, ROOM = 3, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_attention, "BLOCK", 4)


@pytest.mark.parametrize("variant", [{}, ALL, pytest.param({"norm_output": True}, marks=pytest.mark.slow)])
def test_a_cached_head_drafts_what_the_rollout_says(variant):
    """Two documents side by side, each at an index of its own; what is drafted at one changes no other."""
    p = problem(**variant)
    head, dtype = p.config, jnp.float32
    long = [s for s in range(1, p.segments[0].max() + 1) if (p.segments[0] == s).sum() >= 7]
    documents = [p.document(0, s) for s in long[:2]]
    assert len(documents) == 2
    expected = [document.logits(STEPS) for document in documents]
    params = {name: jnp.asarray(x, dtype) for name, x in p.params.items()}
    ready, output, embed = head.ready(params, dtype), head.output(params), jnp.asarray(p.embed, dtype)
    step = jax.jit(partial(head.step, ready))
    cache = head.empty_cache(2, ROOM, dtype)

    def read(indices, count):
        """The first steps at `count` indices of each document from its own on."""
        aux = np.stack([d.aux[0, i : i + count] for d, i in zip(documents, indices, strict=True)])
        return head.begin(ready, jnp.asarray(aux, dtype)), tokens(indices + 1, count)

    def tokens(positions, count):
        return embed[
            np.stack([d.tokens[0, i : i + count] for d, i in zip(documents, positions, strict=True)])
        ]

    def compare(hidden, indices, k, what):
        logits = np.asarray(hidden @ output.T)
        for row, i in enumerate(indices):
            for offset in range(logits.shape[1]):
                wanted = expected[row][k][0, i + offset]
                np.testing.assert_allclose(logits[row, offset], wanted, rtol=1e-4, atol=1e-4, err_msg=what)

    starts = np.zeros(2, np.int32)
    state, embedded = read(starts, 2)
    _, hidden, cache = step(cache, embedded, state, New.behind(jnp.asarray(starts), 2))
    compare(hidden, starts, 0, "prompt")
    for at in (np.array([2, 1], np.int32), np.array([3, 2], np.int32)):
        state, embedded = read(at, 1)
        for k in range(STEPS):
            left, hidden, cache = step(cache, embedded, state, New.behind(jnp.asarray(at + k), 1))
            compare(hidden, at, k, f"step {k} at {at}")
            state, embedded = left, tokens(at + 2 + k, 1)
