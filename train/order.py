"""Which rows every step takes, a function of seed and step alone, and how several runs share one reading.

A step's rows do not depend on what was read before nor on the number of processes or chips, so resuming is
free and a batch can be replayed; only the order of the rows within a batch is made for the chips.

Rows differ in how many of their positions count, and a program has room for what the fullest shard of all
steps needs. Of ShareGPT (T of 2,048, 0.77 of the positions live, 3 rows a chip on 4 chips) that is 0.96 of
the positions where rows come by chance, and 0.86 as they are dealt here; of its prompt-heavy chats
(0.18 live), 0.35 and 0.22.

Dimensions: N rows of a split, S steps, B rows of a batch, R rows of a store.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_SHARES = 2**63  # the number of an epoch that no run reaches
_EMPTY = 2**62  # a place behind those of all rows


class Order(NamedTuple):
    """The rows of every step, int64 [steps, B], and their places: where they lie when the epochs of all rows
    are written one after the other. A row of -1 is empty: it fills up a batch."""

    rows: np.ndarray
    places: np.ndarray


def permutation(n: int, seed: int, number: int) -> np.ndarray:
    """The numbers below n in the order of a seed's epoch `number`."""
    # Philox: numpy promises its stream for ever, unlike that of default_rng.
    return np.random.Generator(np.random.Philox(key=[seed, number])).permutation(n)


def share_of(rows: np.ndarray, seed: int, share: float) -> np.ndarray:
    """A share of the rows, ascending, one at least; a smaller share's rows are among a larger one's."""
    count = max(1, round(share * len(rows)))
    return rows if count >= len(rows) else np.sort(rows[permutation(len(rows), seed, _SHARES)[:count]])


def order(
    rows: np.ndarray,
    seed: int,
    steps: int,
    batch_rows: int,
    share: float = 1.0,
    work: np.ndarray | None = None,
) -> Order:
    """Each epoch is a permutation of its own, and batches run on over its end, so that no row is left out.
    Fewer steps give a prefix, and a share of the rows keeps the order of all.

    `work` int64 [N] says how much is to be computed of each row: every batch of all rows gets about as much.
    """
    count, N = steps * batch_rows, len(rows)
    inside = np.isin(rows, share_of(rows, seed, share))
    epochs = []
    for epoch in range(-(-count // int(inside.sum()))):
        mixed = permutation(N, seed, epoch)
        if work is not None:
            mixed = _dealt(mixed, work[mixed], (epoch * N + np.arange(N)) % batch_rows)
        at = np.flatnonzero(inside[mixed])
        epochs.append((rows[mixed[at]], epoch * N + at))
    return Order(*(np.concatenate(x)[:count].reshape(steps, batch_rows) for x in zip(*epochs, strict=True)))


def _dealt(mixed: np.ndarray, work: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """The rows in an order in which each slot has those of one range of work; of these, as they come."""
    mine = np.empty_like(slot)
    mine[np.argsort(work, kind="stable")] = np.sort(slot)
    dealt = np.empty_like(mixed)
    dealt[np.argsort(slot, kind="stable")] = mixed[np.argsort(mine, kind="stable")]
    return dealt


def level(wanted: Order, work: np.ndarray, shards: int) -> Order:
    """The same batches, with the rows of each in an order that gives every shard about as much `work` [R].

    The next row, of those that are left the one with most, goes to the shard that has least and has room.
    """
    work_SB = np.where(wanted.rows < 0, 0, work[wanted.rows])
    (S, B), batch = wanted.rows.shape, np.arange(len(wanted.rows))
    sums, taken = np.zeros((S, shards), np.int64), np.zeros((S, shards), np.int64)
    at = np.empty((S, B), np.int64)
    for row in np.argsort(-work_SB, axis=1, kind="stable").T:
        shard = np.where(taken < B // shards, sums, np.iinfo(np.int64).max).argmin(1)
        at[batch, shard * (B // shards) + taken[batch, shard]] = row
        taken[batch, shard] += 1
        sums[batch, shard] += work_SB[batch, row]
    return Order(*(np.take_along_axis(x, at, 1) for x in wanted))


def listed(rows: np.ndarray) -> Order:
    """The order of `rows` int64 [steps, B] as they stand."""
    return Order(rows, np.arange(rows.size).reshape(rows.shape))


def each_once(rows: np.ndarray, batch_rows: int) -> Order:
    """The order of `rows`, ascending, filled up with empty ones. A row's place is its number, so that orders
    of some of the same rows share a reading."""
    empty = -len(rows) % batch_rows
    filled = np.concatenate([rows, np.full(empty, -1)])
    places = np.concatenate([rows, _EMPTY + np.arange(empty)])
    return Order(filled.reshape(-1, batch_rows), places.reshape(-1, batch_rows))


class Part(NamedTuple):
    """What a batch that was read is to one of the orders: rows of its batch of step `step`."""

    order: int
    step: int
    slots: np.ndarray  # int32 [B]: where in that batch each row belongs; B where it does not
    whole: bool  # it is that batch
    complete: bool  # with it, that batch has all of its rows


class Reading:
    """What is read until every order has its steps from `first` on: (rows int64 [B], what they are to each
    order), again and again. All orders have the same rows at the same places; none is read twice for one."""

    def __init__(self, orders: Sequence[Order], first: Sequence[int]):
        alike: list[tuple[int, Order, list[int]]] = []  # (first step, what is left, whose it is)
        for number, (one, start) in enumerate(zip(orders, first, strict=True)):
            left = Order(*(x[start:] for x in one))
            known = (whose for at, other, whose in alike if at == start and _same(other, left))
            if (whose := next(known, None)) is None:
                alike.append((start, left, [number]))
            else:
                whose.append(number)
        read = _reading([left for _, left, _ in alike])
        self._rows = read.rows
        self._located = [(start, whose, *_locate(read, left)) for start, left, whose in alike]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[Part]]]:
        at = [0] * len(self._located)
        for t, rows in enumerate(self._rows):
            parts = []
            for group, (first, whose, batch, row) in enumerate(self._located):
                while at[group] < len(batch) and batch[at[group]].min() <= t:
                    part = _part(first, at[group], t, batch, row)
                    parts.extend(part._replace(order=number) for number in whose)
                    if not part.complete:
                        break
                    at[group] += 1
            yield rows, sorted(parts, key=lambda part: part.order)


def _same(one: Order, other: Order) -> bool:
    """Whether the rows are the same; what lies at a place is the same for all orders."""
    return one.places is other.places or np.array_equal(one.places, other.places)


def _reading(left: Sequence[Order]) -> Order:
    """What is read for all: the batches of one order if they hold everything, else all rows as they come."""
    largest = max(left, key=lambda one: one.rows.size)
    B = largest.rows.shape[1]
    places, first = np.unique(np.concatenate([one.places.ravel() for one in left]), return_index=True)
    if len(places) == largest.rows.size:
        return largest
    rows = np.concatenate([one.rows.ravel() for one in left])[first]
    missing = -len(places) % B
    rows = np.append(rows, np.full(missing, -1))
    places = np.append(places, np.full(missing, np.iinfo(np.int64).max))
    return Order(rows.reshape(-1, B), places.reshape(-1, B))


def _locate(read: Order, wanted: Order) -> tuple[np.ndarray, np.ndarray]:
    """(number of the batch, row in it) at which each row of `wanted` is read, [steps, B] each."""
    flat = read.places.ravel()
    ascending = np.argsort(flat, kind="stable")
    found = ascending[np.searchsorted(flat, wanted.places, sorter=ascending)]
    return np.divmod(found, read.rows.shape[1])


def _part(first: int, step: int, t: int, batch: np.ndarray, row: np.ndarray) -> Part:
    """The part, of no order yet."""
    B = batch.shape[1]
    (here,) = np.nonzero(batch[step] == t)
    slots = np.full(B, B, np.int32)
    slots[row[step][here]] = here
    whole = bool((slots == np.arange(B)).all())
    return Part(-1, first + step, slots, whole, bool((batch[step] <= t).all()))
