"""The walk is what a server counts, draft by draft."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.targets import counted_targets
from train.walk import answers, by_position, lengths, walk

K = 4
SERVED = (range(3, 11), range(20, 27), range(27 + 5, 40))  # the answers' tokens of a row of two documents


def rows(seed, B=3, T=40):
    """(tokens, segments, mask) of B rows; the second document begins at 17 and has two answers."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((B, T), np.uint8)
    for answer in SERVED:
        mask[:, answer] = 1
    return rng.integers(9, size=(B, T)), np.repeat([[1] * 17 + [2] * 23], B, 0), mask


def served(text, answer, propose, k, most=None):
    """(drafts, accepted by position) of a server that decodes greedily and gives the tokens of `answer`.

    `propose(index)` gives the draft behind the hidden state of `index`, whose next token is known.
    """
    drafts, accepted = 0, np.zeros(k)
    end = answer.stop if most is None else min(answer.stop, answer.start + most)
    known = answer.start + 1  # the prompt, and one token by the target
    while known < end:
        drafts += 1
        draft, right = propose(known - 2)[:k], 0
        while right < k and known + right < answer.stop and draft[right] == text[known + right]:
            right += 1
        accepted[:right] += 1
        known += right + 1
    return drafts, accepted


def flags_of(proposed, tokens, segments, counted):
    """float [B, T, K]: the draft's token p at index i is the text's, in the same answer."""
    B, T = tokens.shape
    right = np.zeros((B, T, K), np.float32)
    for b in range(B):
        for i in range(T):
            for p in range(K):
                j = i + 1 + p
                inside = j + 1 < T and counted[b, j] and segments[b, i] == segments[b, j]
                right[b, i, p] = inside and proposed[b, i, p] == tokens[b, j + 1]
    return right


@pytest.mark.parametrize("most", [None, 5, 1])
def test_greedy_walks_are_a_servers(most):
    tokens, segments, mask = rows(0)
    rng = np.random.default_rng(1)
    truth = np.stack([np.roll(tokens, -2 - p, 1) for p in range(K)], -1)
    proposed = np.where(rng.random(truth.shape) < 0.6, truth, 0)
    counted = counted_targets(segments, mask)
    found = walk(
        jnp.asarray(flags_of(proposed, tokens, segments, counted)),
        *answers(jnp.asarray(counted), jnp.asarray(segments), most),
    )
    for k in range(1, K + 1):
        drafts, accepted = 0, np.zeros(k)
        for b in range(len(tokens)):
            for answer in SERVED:
                more = served(tokens[b], answer, lambda i, b=b: proposed[b, i], k, most)
                drafts, accepted = drafts + more[0], accepted + more[1]
        assert found.drafts[k - 1] == drafts
        np.testing.assert_array_equal(found.accepted[k - 1, :k], accepted)
        assert lengths(found)[k - 1] == pytest.approx(1 + accepted.sum() / max(drafts, 1))
    if most is None:
        np.testing.assert_allclose(by_position(found), accepted / drafts, rtol=1e-6)
        assert 1.5 < lengths(found)[-1] < K


def test_the_walk_and_the_average_over_positions_differ():
    """Every other token is hard: a server's drafts begin behind the hard ones, where the next one is easy."""
    counted = jnp.asarray([[False] + [True] * 12 + [False]])
    segments = jnp.ones((1, 14), jnp.int32)
    accept = np.zeros((1, 14, 1), np.float32)
    accept[0, 1:12:2] = 1  # at index 1, where the first draft stands, then at every second one
    found = walk(jnp.asarray(accept), *answers(counted, segments))
    assert lengths(found) == [2.0]  # by position it would be 1.5
    assert found.drafts[0] == 6


def test_the_sampled_walk_is_the_mean_of_many_random_ones():
    rng = np.random.default_rng(2)
    tokens, segments, mask = rows(3, B=1)
    counted = counted_targets(segments, mask)
    inside = flags_of(np.stack([np.roll(tokens, -2 - p, 1) for p in range(K)], -1), tokens, segments, counted)
    chance = inside * rng.uniform(0.2, 0.9, inside.shape).astype(np.float32)
    found = walk(jnp.asarray(chance), *answers(jnp.asarray(counted), jnp.asarray(segments)))
    times, drafts, accepted = 20_000, 0, np.zeros(K)
    for answer in SERVED:
        at = np.full(times, answer.start - 1)
        while (going := at < answer.stop - 2).any():
            at = at[going]
            hits = np.cumprod(rng.random((len(at), K)) < chance[0, at], 1)
            drafts, accepted = drafts + len(at), accepted + hits.sum(0)
            at = at + 1 + hits.sum(1)
    np.testing.assert_allclose(found.drafts[-1], drafts / times, rtol=0.01)
    np.testing.assert_allclose(found.accepted[-1], accepted / times, rtol=0.02)


def test_an_answer_of_one_token_needs_no_draft():
    counted = jnp.asarray([[False, True, False, False]])
    found = walk(jnp.ones((1, 4, 2)), *answers(counted, jnp.ones((1, 4), jnp.int32)))
    assert lengths(found) == [1.0, 1.0]
    assert by_position(found) == [0.0, 0.0]


def test_a_document_that_begins_with_its_answer_is_walked_from_its_first_index():
    segments, mask = np.array([[1, 1, 2, 2, 2, 2]]), np.array([[0, 0, 1, 1, 1, 1]], np.uint8)
    begins, drafts = answers(jnp.asarray(counted_targets(segments, mask)), jnp.asarray(segments))
    assert np.flatnonzero(begins).tolist() == [2]
    assert np.flatnonzero(drafts).tolist() == [2, 3]
