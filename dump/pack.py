"""Conversations are split by the chat they belong to and packed into rows of T tokens.

Legend: R rows, T tokens a row, V vocabulary.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from common.errors import EyasError
from dump.chat import Encoded

TRAIN, TEST = "train", "test"
_CHUNKS = 20  # of a chat of ShareGPT; a few have more, which are at most 1% of a file then
_FULL = 0.95  # of a length that is advised, where there is one


@dataclass(frozen=True)
class Packed:
    """The rows of a store: `arrays` [R, T], the index of conversations, counted train tokens [V]."""

    arrays: dict[str, np.ndarray]
    index: pa.Table
    token_counts: np.ndarray
    train_rows: int


def split(bases: list[str], holdout: float, seed: int) -> np.ndarray:
    """bool [n]: whether each conversation is held out; all that share a base share the answer.

    A base is held out when the hash of seed and base falls below `holdout`, whatever else is in the data.
    If that leaves one side empty, the base nearest to the limit changes sides. A base of more conversations
    than a chat has chunks is taken for a running number, and each of its conversations counts as its own.
    EyasError if there is only one conversation to split.
    """
    if holdout == 0:
        return np.zeros(len(bases), bool)
    if len(bases) < 2:
        raise EyasError(
            "one conversation cannot be split into train and test; give more data, or set holdout to 0"
        )
    bases = _small_groups(bases)
    draws = {base: _uniform(f"{seed}:{base}") for base in set(bases)}
    ordered = sorted(draws, key=lambda base: (draws[base], base))
    held = sum(draw < holdout for draw in draws.values())
    test = set(ordered[: min(max(held, 1), len(ordered) - 1)])
    return np.array([base in test for base in bases])


def _small_groups(bases: list[str]) -> list[str]:
    """The bases, numbered where more conversations share one than a chat has chunks."""
    sizes = Counter(bases)
    largest = max(_CHUNKS, len(bases) // 100)
    if len(sizes) == 1:
        largest = 0
    return [base if sizes[base] <= largest else f"{base}_{i}" for i, base in enumerate(bases)]


def _uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def best_fit(lengths: np.ndarray, T: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most T: longest first, each into the fullest row that fits.

    Ties keep the order of the indices, so the result is a function of `lengths` and T alone.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(T + 1)]  # rows by the tokens they still have room for
    rooms = 0  # bit r is set where by_room[r] is not empty, so that the tightest fit is one bit operation
    for item in np.argsort(-lengths, kind="stable"):
        length = int(lengths[item])
        assert 0 < length <= T, (length, T)
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = T, len(rows)
            rows.append([])
        rows[row].append(int(item))
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def fill(lengths: np.ndarray, T: int) -> float:
    """The share of tokens that are no padding when conversations of these lengths, cut at T, are packed."""
    cut = np.minimum(lengths, T)
    return float(cut.sum() / (len(best_fit(cut, T)) * T))


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


def pack(
    ids: list[str], conversations: list[Encoded], held_out: np.ndarray, T: int, V: int, seed: int
) -> Packed:
    """Packs both splits apart: the train rows, shuffled by `seed`, come first, then the test rows.

    Conversations are at most T tokens long. A row's segments count from 1 in its order; 0 is padding.
    """
    lengths = np.array([len(c.tokens) for c in conversations], np.int64)
    rows: list[list[int]] = []
    for side in (False, True):
        members = np.flatnonzero(held_out == side)
        packed = best_fit(lengths[members], T)
        if not side:
            order = np.random.default_rng(seed).permutation(len(packed))
            packed, train_rows = [packed[i] for i in order], len(packed)
        rows += [[int(members[i]) for i in row] for row in packed]
    arrays = {name: np.zeros((len(rows), T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    arrays["loss_mask"] = np.zeros((len(rows), T), np.uint8)
    lines = []
    for number, row in enumerate(rows):
        start = 0
        for segment, item in enumerate(row, 1):
            here, length = conversations[item], len(conversations[item].tokens)
            place = (number, slice(start, start + length))
            arrays["tokens"][place] = here.tokens
            arrays["segment_ids"][place] = segment
            arrays["positions"][place] = np.arange(length)
            arrays["loss_mask"][place] = here.mask
            side = TEST if held_out[item] else TRAIN
            lines.append((ids[item], side, number, start, length, int(here.mask.sum())))
            start += length
    counted = arrays["tokens"][:train_rows][arrays["loss_mask"][:train_rows] == 1]
    counts = np.bincount(counted, minlength=V).astype(np.int64)
    return Packed(arrays, _index(lines), counts, train_rows)


def _index(lines: list[tuple]) -> pa.Table:
    names = ("id", "split", "row", "start", "length", "counted")
    kinds = (pa.string(), pa.string(), pa.int32(), pa.int32(), pa.int32(), pa.int32())
    columns = zip(*lines, strict=True)
    return pa.table(
        {name: pa.array(column, kind) for name, kind, column in zip(names, kinds, columns, strict=True)}
    )
