"""How much of a store's rows is computed, and what room that takes in a program.

Dimensions: R rows of a store, T positions.
"""

from dataclasses import replace

import numpy as np

from common import pod
from common.store import Store
from train.anchors import most_live, most_sampled, stretch_starts
from train.targets import (
    Capacity,
    counted_targets,
    drafted_targets,
    live_capacity,
    live_queries,
    round_up,
)

MASKING = ("segment_ids", "loss_mask")  # what it follows from
_MASKS = 4096  # rows whose masks are looked at together


class Workload:
    """Which positions of every row are computed (see train/targets.py), from the store's masks alone. Of
    several processes each reads a part of them.

    `targets` int64 [R]: how many of each row are targets; `drafted`: how many of them are predicted.
    """

    def __init__(self, store: Store, rows: np.ndarray, ttt_steps: int, compat: str | None = None):
        self.ttt_steps, self.compat, self._length = ttt_steps, compat, store.length
        self._live, self.targets, self.drafted, self._stretches = np.zeros((4, store.rows), np.int64)
        shares = np.array_split(rows, pod.size())
        with pod.together():
            counts = self._counts(store, shares[pod.index()])
        for share, found in zip(shares, pod.exchange(counts), strict=True):
            self._live[share], self.targets[share], self.drafted[share], self._stretches[share] = found

    def _counts(self, store: Store, rows: np.ndarray) -> tuple[list[int], ...]:
        """(live indices, targets, those that are predicted, stretches of targets) of each of these rows."""
        counts: tuple[list[int], ...] = [], [], [], []
        for start in range(0, len(rows), _MASKS):
            found = store.read(MASKING, rows[start : start + _MASKS])
            live, targets = self.masks(**found)
            masks = live, targets, drafted_targets(targets, found["segment_ids"]), stretch_starts(targets)
            for known, mask in zip(counts, masks, strict=True):
                known.extend(mask.sum(1).tolist())
        return counts

    def counted(self, rows: np.ndarray) -> int:
        """The targets of these rows that are predicted, at the first step at least."""
        return int(self.drafted[rows].sum())

    def masks(self, segment_ids: np.ndarray, loss_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [B, T] each: live queries, counted targets."""
        targets = counted_targets(segment_ids, loss_mask, self.compat)
        return live_queries(segment_ids, targets, self.ttt_steps), targets

    def capacity(self, batches: np.ndarray, shards: int, anchors: float = 1.0) -> Capacity:
        """What the fullest shard of `batches` int64 [n, B] needs; a row of -1 is empty. `anchors`: the share
        of the targets that the steps behind step 0 compute."""
        parts = batches.reshape(len(batches) * shards, -1)

        def room(*counts: np.ndarray) -> Capacity:
            live, targets = (int(np.where(parts < 0, 0, x[parts]).sum(1).max()) for x in counts)
            return Capacity(live_capacity(live, parts.shape[1] * self._length), round_up(targets))

        whole = room(self._live, self.targets)
        if anchors == 1 or self.ttt_steps == 1:
            return whole
        sample = most_sampled(self.targets, anchors)
        live = np.minimum(self._live, most_live(sample, self._stretches, self.ttt_steps))
        return replace(whole, later=room(live, sample))
