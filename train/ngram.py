"""What a predictor without a network reaches: a head that does not clearly beat it has learnt little.

Both are fitted on the train rows, on what the target says at counted positions: the unigram always predicts
the most frequent token, the bigram the most frequent one after the current token (the unigram's where that
was never seen). Scored on the test rows like a head: step k is teacher-forced, a chain is steps 0..k right.
"""

from typing import Any

import numpy as np

from common.store import Store
from train.metrics import Sums, summarise
from train.targets import counted_targets

_ROWS = 1024  # read at once
_NAMES = ("tokens", "segment_ids", "loss_mask", "argmax")


def evaluate(store: Store, steps: int) -> dict[str, dict[str, Any]]:
    """{"unigram", "bigram": {"acc", "cond_acc", "full_acc": [K], "length_greedy", ...}} on the test rows."""
    unigram, bigram = fit(store)
    test = store.split_rows("test")
    found = {}
    for name, table_V in (("unigram", np.full_like(bigram, unigram)), ("bigram", bigram)):
        sums = None
        for start in range(0, len(test), _ROWS):
            part = _sums(store.read(_NAMES, test[start : start + _ROWS]), table_V, steps)
            sums = part if sums is None else Sums(*(a + b for a, b in zip(sums, part, strict=True)))
        metrics = summarise(sums)
        found[name] = {n: metrics[n] for n in ("acc", "cond_acc", "full_acc", "length_greedy", "counted")}
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
    rising = np.lexsort((-said, counts))  # the last one written of a token is its most frequent
    best[after[rising]] = said[rising]
    return unigram, best


def _sums(found: dict[str, np.ndarray], table_V: np.ndarray, steps: int) -> Sums:
    """The sums of rows [B, T]: index i drafts for the targets i+1+k of its document."""
    segments = found["segment_ids"]
    counted = counted_targets(segments, found["loss_mask"])
    right = counted & (table_V[found["tokens"]] == found["argmax"])
    totals: dict[str, list[float]] = {name: [] for name in Sums._fields}
    whole = np.ones(segments.shape, bool)
    good = whole.copy()
    for step in range(steps):
        here, hit = (_ahead(flags, segments, step + 1) for flags in (counted, right))
        whole, before, good = whole & here, good, good & hit
        values = (here, hit, np.zeros(1), whole, good, whole & before, np.zeros(1), np.zeros(1))
        for name, value in zip(Sums._fields, values, strict=True):
            totals[name].append(float(value.sum()))
    return Sums(**{name: np.array(values) for name, values in totals.items()})


def _ahead(flags_BT: np.ndarray, segments_BT: np.ndarray, by: int) -> np.ndarray:
    """flags[i + by] at i, where that is the same document; else False."""
    out = np.zeros_like(flags_BT)
    if by < flags_BT.shape[1]:
        out[:, :-by] = flags_BT[:, by:] & (segments_BT[:, by:] == segments_BT[:, :-by])
    return out
