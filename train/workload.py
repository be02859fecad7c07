"""How much of a store's rows is computed, and what room that takes in a program.

Dimensions: R rows of a store, T positions, S pieces of a row (train/pieces.py), L positions of a piece.
"""

from dataclasses import replace

import numpy as np

from common import pod
from common.store import Store
from train import pieces
from train.anchors import changes, most_live, most_sampled, stretch_starts
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

    def __init__(
        self, store: Store, rows: np.ndarray, ttt_steps: int, compat: str | None = None, pieces: int = 1
    ):
        """`pieces`: on so many chips each row lies."""
        self.ttt_steps, self.compat, self.pieces, self._length = ttt_steps, compat, pieces, store.length
        self.targets, self.drafted, self._stretches = np.zeros((3, store.rows), np.int64)
        self._live, self._taught = np.zeros((2, store.rows, pieces), np.int64)  # of each piece
        shares = np.array_split(rows, pod.size())
        with pod.together():
            counts = self._counts(store, shares[pod.index()])
        for share, found in zip(shares, pod.exchange(counts), strict=True):
            of_rows, of_pieces = found
            self.targets[share], self.drafted[share], self._stretches[share] = of_rows
            if len(share):
                self._live[share], self._taught[share] = of_pieces

    def _counts(self, store: Store, rows: np.ndarray) -> tuple[tuple[list, ...], tuple[list, ...]]:
        """(targets, those that are predicted, stretches of targets) of each of these rows, and (live indices,
        targets) of each of their pieces."""
        of_rows: tuple[list[int], ...] = [], [], []
        of_pieces: tuple[list[list[int]], ...] = [], []
        for start in range(0, len(rows), _MASKS):
            found = store.read(MASKING, rows[start : start + _MASKS])
            live, targets = self.masks(**found)
            masks = targets, drafted_targets(targets, found["segment_ids"]), stretch_starts(targets)
            for known, mask in zip(of_rows, masks, strict=True):
                known.extend(mask.sum(1).tolist())
            for known, mask in zip(of_pieces, (self.live(live), self.taught(targets)), strict=True):
                known.extend(mask.reshape(len(mask), self.pieces, -1).sum(2).tolist())
        return of_rows, of_pieces

    def live(self, live_RT: np.ndarray) -> np.ndarray:
        """bool [R, S * L]: the live indices, piece by piece."""
        return pieces.spread(live_RT, self.pieces, self.ttt_steps)

    def taught(self, targets_RT: np.ndarray) -> np.ndarray:
        """bool [R, S * L]: the targets of each piece's indices, also those that lie in the next piece."""
        return pieces.spread(targets_RT, self.pieces, self.ttt_steps, ahead=self.ttt_steps)

    def counted(self, rows: np.ndarray) -> int:
        """The targets of these rows that are predicted, at the first step at least."""
        return int(self.drafted[rows].sum())

    def masks(self, segment_ids: np.ndarray, loss_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [B, T] each: live queries, counted targets."""
        targets = counted_targets(segment_ids, loss_mask, self.compat)
        return live_queries(segment_ids, targets, self.ttt_steps), targets

    def capacity(self, batches: np.ndarray, shards: int, shares: tuple[float, ...] = ()) -> Capacity:
        """What the fullest chip needs of one of so many shards of `batches` int64 [n, B]; a row of -1 is
        empty. `shares`: what of the targets each step computes, all by default."""
        parts = batches.reshape(len(batches) * shards, -1)
        own = self._length // self.pieces
        positions = own if self.pieces == 1 else own + pieces.halo(own, self.ttt_steps)

        def room(*counts: np.ndarray) -> Capacity:
            live, targets = (int(np.where(parts[..., None] < 0, 0, x[parts]).sum(1).max()) for x in counts)
            return Capacity(live_capacity(live, parts.shape[1] * positions), round_up(targets))

        def of_sample(first: int, share: float) -> Capacity:
            sample = most_sampled(self.targets, share)  # it may lie in any one piece
            live = most_live(sample, self._stretches, self.ttt_steps - first)
            return room(np.minimum(self._live, live[:, None]), np.minimum(self._taught, sample[:, None]))

        samples = tuple((first, of_sample(first, share)) for first, share in changes(shares).items())
        return replace(room(self._live, self._taught), samples=samples)
