"""What a predictor without a network reaches: a head that does not clearly beat it has learnt little.

Both are fitted on the train rows, on what the target says at counted positions: the unigram always predicts
the most frequent token, the bigram the most frequent one after the current token (or the unigram's, after a
token that was never seen). They are scored on the test rows like a head: at step k the text's own tokens are
the input, and each answer is walked through as a server does.
"""

from typing import Any

import jax
import numpy as np

from common.store import Store
from train.metrics import Sums, add, index_sums, summarise
from train.targets import at_indices, counted_targets

_ROWS = 256  # read at once
_NAMES = ("tokens", "segment_ids", "loss_mask", "argmax")
# An n-gram has no probabilities to sample from.
_FIGURES = (
    "acc",
    "cond_acc",
    "full_acc",
    "length_greedy",
    "length_greedy_by_k",
    "accepted_greedy",
    "counted",
    "drafts",
)
_index_sums = jax.jit(index_sums, static_argnums=5)


def evaluate(store: Store, steps: int, answer_tokens: int | None = None) -> dict[str, dict[str, Any]]:
    """{"unigram", "bigram": the greedy ones of train/metrics.py's figures} on the test rows."""
    unigram, bigram = fit(store)
    test = store.split_rows("test")
    found = {}
    for name, table_V in (("unigram", np.full_like(bigram, unigram)), ("bigram", bigram)):
        sums = None
        for start in range(0, len(test), _ROWS):
            rows = store.read(_NAMES, test[start : start + _ROWS])
            sums = add(sums, _sums(rows, table_V, steps, answer_tokens))
        metrics = summarise(sums)
        found[name] = {figure: metrics[figure] for figure in _FIGURES}
    return found


def fit(store: Store) -> tuple[int, np.ndarray]:
    """(the most frequent target, int64 [V] the most frequent target after each token); ties: the lower id."""
    V = store.manifest["rows"]["vocab_size"]
    rows = store.split_rows("train")
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, len(rows), _ROWS):
        found = store.read(_NAMES, rows[start : start + _ROWS])
        counted = counted_targets(found["segment_ids"], found["loss_mask"])
        new = found["tokens"][counted].astype(np.int64) * V + found["argmax"][counted]
        seen, times = np.unique(new, return_counts=True)
        both, where = np.unique(np.concatenate([pairs, seen]), return_inverse=True)
        counts = np.bincount(where, np.concatenate([counts, times])).astype(np.int64)
        pairs = both
    after, said = pairs // V, pairs % V
    unigram = int(np.bincount(said, counts, minlength=V).argmax())
    best = np.full(V, unigram)
    # Assigned in the order of rising counts, a token's entry ends up as what came most often after it; among
    # equals the lowest id is assigned last.
    rising = np.lexsort((-said, counts))
    best[after[rising]] = said[rising]
    return unigram, best


def _sums(found: dict[str, np.ndarray], table_V: np.ndarray, steps: int, answer_tokens: int | None) -> Sums:
    """The sums of rows [B, T]: what index i drafts at each step."""
    segments = found["segment_ids"]
    counted = counted_targets(segments, found["loss_mask"])
    right = counted & (table_V[found["tokens"]] == found["argmax"])
    valid_BTK, right_BTK = (
        np.stack(list(at_indices(flags, segments, steps)), -1) for flags in (counted, right)
    )
    return _index_sums(valid_BTK, right_BTK, right_BTK.astype(np.float32), counted, segments, answer_tokens)
