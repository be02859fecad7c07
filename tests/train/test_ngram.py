"""The predictors that a head must beat, against a loop that is easy to read."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from common.store import Store
from tests.train import small_store
from train import ngram

STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("ngram") / "store")))


def documents(store, split):
    """(tokens, argmax, counted) of every document."""
    found = store.read(("tokens", "segment_ids", "loss_mask", "argmax"), store.split_rows(split))
    for row in range(len(found["tokens"])):
        for segment in (1, 2):
            (where,) = np.nonzero(found["segment_ids"][row] == segment)
            tokens, argmax, mask = (found[n][row, where] for n in ("tokens", "argmax", "loss_mask"))
            yield tokens, argmax, [*(mask[1:] > 0), False]


def most_frequent(counts):
    return min(counts, key=lambda token: (-counts[token], token))


def tables(store):
    after, overall = defaultdict(Counter), Counter()
    for tokens, argmax, counted in documents(store, "train"):
        for token, said, counts in zip(tokens, argmax, counted, strict=True):
            if counts:
                after[token][said] += 1
                overall[said] += 1
    return most_frequent(overall), {token: most_frequent(counts) for token, counts in after.items()}


def test_tables_are_the_most_frequent_answers(store):
    unigram, bigram = ngram.fit(store)
    expected_unigram, expected = tables(store)
    assert unigram == expected_unigram
    for token in range(small_store.V):
        assert bigram[token] == expected.get(token, unigram)


def test_tables_do_not_depend_on_how_many_rows_are_read_at_once(store, monkeypatch):
    unigram, bigram = ngram.fit(store)
    monkeypatch.setattr(ngram, "_ROWS", 2)
    again, table = ngram.fit(store)
    assert again == unigram
    np.testing.assert_array_equal(table, bigram)


def test_scores_are_those_of_a_loop(store, monkeypatch):
    monkeypatch.setattr(ngram, "_ROWS", 2)
    unigram, bigram = tables(store)
    acc, full = np.zeros((2, STEPS)), np.zeros((2, STEPS))
    for tokens, argmax, counted in documents(store, "test"):
        for i in range(len(tokens)):
            right = True
            whole = True
            for k in range(STEPS):
                j = i + 1 + k
                here = j < len(tokens) and counted[j]
                hit = here and bigram.get(tokens[j], unigram) == argmax[j]
                acc[:, k] += hit, here
                whole, right = whole and here, right and hit
                full[:, k] += whole and right, whole
    found = ngram.evaluate(store, STEPS)["bigram"]
    np.testing.assert_allclose(found["acc"], acc[0] / acc[1])
    np.testing.assert_allclose(found["full_acc"], full[0] / full[1])
    drafts, accepted = 0, 0
    for tokens, argmax, counted in documents(store, "test"):
        i = counted.index(True)  # the answer's first token is known, and the first draft stands before it
        while i + 2 < len(tokens) and counted[i + 1]:
            draft = [
                bigram.get(tokens[j], unigram) == argmax[j]
                for j in range(i + 1, min(i + 1 + STEPS, len(tokens) - 1))
            ]
            run = [*draft, False].index(False)
            drafts, accepted, i = drafts + 1, accepted + run, i + run + 1
    assert found["drafts"] == drafts
    assert found["length_greedy"] == pytest.approx(1 + accepted / drafts)
    assert found["counted"] == acc[1, 0]
