"""Anchored rollouts: some steps are computed for a sample of a row's targets.

Which step computes what share of them is the kind's to say (`shares`): most often step 0 all, the other K - 1
steps one share. What a step loses is divided by so many fewer: the loss and its gradient keep their
expectation. A sample is a stretch of the targets of a row, for the indices that draft them are then few: of k
steps as many, and k - 1 more where a stretch begins. A smaller one is the beginning of a larger one. Which
one depends on seed, step and row alone: not on where the row lies in the batch, nor on which chip.

Dimensions: R and B rows, T positions, K steps.
"""

from itertools import pairwise

import numpy as np

_STREAM = 2**62  # apart from the numbers of epochs


def behind_first(anchors: float, steps: int) -> tuple[float, ...]:
    """The shares of a head whose other steps need all of step 0: that has all targets."""
    return (1.0, *[anchors] * (steps - 1))


def changes(shares: tuple[float, ...]) -> dict[int, float]:
    """{step: share} of the first step of every share that is not that of the step before, 1 before them."""
    assert all(0 < b <= a <= 1 for a, b in pairwise((1.0, *shares))), shares
    return {k: b for k, (a, b) in enumerate(pairwise((1.0, *shares))) if a != b}


def begins(rows: np.ndarray, seed: int, step: int) -> np.ndarray:
    """float64 [B], evenly from 0 to 1: how far behind a row's first target its sample begins. A row of -1 is
    empty."""

    def draw(row: int) -> float:
        own = np.random.Philox(key=[seed, _STREAM + step], counter=[0, row + 1, 0, 0])
        return np.random.Generator(own).random()

    return np.array([draw(int(row)) for row in rows])


def sampled(counted_RT: np.ndarray, share: float, begin_R: np.ndarray) -> np.ndarray:
    """bool [R, T]: a share of each row's targets, one after the other, the first ones again behind the last.
    Each is as likely, to the share, where `begin` is drawn evenly."""
    count_R1 = counted_RT.sum(1, keepdims=True)
    place_RT = np.cumsum(counted_RT, 1) - 1 - begin_R[:, None] * count_R1
    return counted_RT & (place_RT % np.maximum(count_R1, 1) < share * count_R1)


def most_sampled(count_R: np.ndarray, share: float) -> np.ndarray:
    """int64 [R]: how many of so many targets are sampled at most."""
    return np.ceil(share * count_R).astype(np.int64)


def most_live(sampled_R: np.ndarray, stretches_R: np.ndarray, steps: int) -> np.ndarray:
    """int64 [R]: how many indices draft such samples at most in so many steps; targets lie in so many
    stretches of a row. A sample cuts one of them in two."""
    return sampled_R + (steps - 1) * (stretches_R + 1)


def stretch_starts(counted_RT: np.ndarray) -> np.ndarray:
    """bool [R, T]: the targets that follow no other at once."""
    found = counted_RT.copy()
    found[:, 1:] &= ~counted_RT[:, :-1]
    return found
