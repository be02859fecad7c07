"""Conversations are split by the chat they belong to and packed into rows of T tokens, by lengths alone.

Legend: n conversations, R rows, T tokens a row. Millions of conversations: numbers in arrays, no objects.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import EyasError

_CHUNKS = 20  # of a chat of ShareGPT; a few have more, which are at most 1% of a file then
_FULL = 0.95  # of a length that is advised, where there is one


@dataclass(frozen=True)
class Packed:
    """Which conversations are in which row: row r has `items[first[r] : first[r + 1]]`, in that order.

    The first `train_rows` rows are of the train split, the others of the test split.
    """

    items: np.ndarray  # int64 [n]
    first: np.ndarray  # int64 [R + 1]
    train_rows: int

    @property
    def rows(self) -> int:
        """R."""
        return len(self.first) - 1


def draw(base: str, seed: int) -> int:
    """What decides about the chat `base`: 64 bits, a function of base and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{base}".encode()).digest()[:8], "big")


def split(draws: np.ndarray, base: Callable[[int], str], holdout: float, seed: int) -> np.ndarray:
    """bool [n]: whether each conversation is held out; all that share a base share the answer.

    `draws` uint64 [n]: `draw(base, seed)` of each; `base` gives that of the i-th again. A base is held out
    when its draw, as a share of 2^64, falls below `holdout`, whatever else is in the data. If that leaves one
    side empty, the base nearest to the limit changes sides. A base of more conversations than a chat has
    chunks is taken for a running number, and each of its conversations counts as its own. EyasError if there
    is only one conversation to split.
    """
    if holdout == 0:
        return np.zeros(len(draws), bool)
    if len(draws) < 2:
        raise EyasError(
            "one conversation cannot be split into train and test; give more data, or set holdout to 0"
        )
    draws = _small_groups(draws, base, seed)
    ordered = np.unique(draws)
    held = int((ordered.astype(np.float64) / 2**64 < holdout).sum())
    return draws < ordered[min(max(held, 1), len(ordered) - 1)]


def _small_groups(draws: np.ndarray, base: Callable[[int], str], seed: int) -> np.ndarray:
    """The draws, anew for each conversation where more of them share a base than a chat has chunks."""
    _, group, sizes = np.unique(draws, return_inverse=True, return_counts=True)
    largest = max(_CHUNKS, len(draws) // 100) if len(sizes) > 1 else 0
    draws = draws.copy()
    for i in np.flatnonzero(sizes[group] > largest).tolist():
        draws[i] = draw(f"{base(i)}_{i}", seed)
    return draws


def best_fit(lengths: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """(items, first) of rows whose lengths sum to at most T, as `Packed` has them: longest first, each into
    the fullest row that fits.

    Ties keep the order of the indices, so the result is a function of `lengths` and T alone.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = array("q", bytes(8 * len(order)))  # of the items, in that order
    # Rows by the tokens they still have room for: the last row of each room, and behind each row the next.
    last, behind = [-1] * (T + 1), array("q")
    rooms = 0  # bit r is set where last[r] is a row, so that the tightest fit is one bit operation
    for place, length in enumerate(_numbers(lengths, order)):
        assert 0 < length <= T, (length, T)
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = last[room]
            last[room] = behind[row]
            if last[room] < 0:
                rooms &= ~(1 << room)
        else:
            room, row = T, len(behind)
            behind.append(-1)
        row_of[place] = row
        room -= length
        behind[row], last[room] = last[room], row
        rooms |= 1 << room
    rows = np.array(row_of, np.int64)
    return order[np.argsort(rows, kind="stable")], _edges(np.bincount(rows, minlength=len(behind)))


def _numbers(lengths: np.ndarray, order: np.ndarray, piece: int = 1 << 16) -> Iterator[int]:
    """lengths[order] as Python's numbers, which are the faster ones in a loop, few at a time."""
    for start in range(0, len(order), piece):
        yield from lengths[order[start : start + piece]].tolist()


def _edges(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)


def fill(lengths: np.ndarray, T: int) -> float:
    """The share of tokens that are no padding when conversations of these lengths, cut at T, are packed."""
    cut = np.minimum(lengths, T)
    return float(cut.sum() / ((len(best_fit(cut, T)[1]) - 1) * T))


def advise_length(lengths: np.ndarray, T: int) -> tuple[int, float]:
    """The row length nearest to T that fills well and cuts no more than T does, and its fill.

    Tried are multiples of 64 up to 8 T, on at most 5,000 of the conversations; where none fills well, it is
    the one that fills best.
    """
    some = lengths[:: max(1, len(lengths) // 5000)]
    least = min(T, int(lengths.max()))
    steps = {-(-least // 64) * 64 + 64 * i for i in range(8)} | {-(-T * i // 512) * 64 for i in range(8, 65)}
    found = {length: fill(some, length) for length in sorted(s for s in steps if s >= least)} | {
        T: fill(some, T)
    }
    best = min(max(found.values()), _FULL)
    return min((abs(length - T), length, share) for length, share in found.items() if share >= best)[1:]


def pack(lengths: np.ndarray, held_out: np.ndarray, T: int, seed: int) -> Packed:
    """Packs both splits apart: the train rows, shuffled by `seed`, come first, then the test rows.

    `lengths` int [n], at most T; `held_out` bool [n].
    """
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    items, first = best_fit(lengths[train], T)
    items, first = _reordered(items, first, np.random.default_rng(seed).permutation(len(first) - 1))
    train_rows = len(first) - 1
    test_items, test_first = best_fit(lengths[test], T)
    return Packed(
        np.concatenate((train[items], test[test_items])),
        np.concatenate((first, len(items) + test_first[1:])),
        train_rows,
    )


def _reordered(items: np.ndarray, first: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows `order` of rows (items, first)."""
    sizes = np.diff(first)[order]
    edges = _edges(sizes)
    places = np.repeat(first[:-1][order] - edges[:-1], sizes) + np.arange(len(items))
    return items[places], edges
