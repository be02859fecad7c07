"""Which positions a batch has to compute, and how indices, steps and targets lie to each other.

**The alignment**, which everything else takes from here: index i at TTT step k reads the token at position
j = i + 1 + k, is taught by the target's output at j, and so predicts token j + 1 = i + 2 + k.

A position is a *target* if it counts: its next token belongs to an answer. An index is *live* if it drafts:
one of its K targets counts. Two facts of TTT make the rest needless: a query of step k sees only step 0's
keys and its own index, so an index that is not live needs keys and nothing else; and a target is shared by
all K steps, so its teacher is needed once. Both are found on the host from masks alone, at static capacities.

Dimensions: R and B rows, T positions, n = B * T, C live indices, M targets, K steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.batch import Batch

# Share of live positions above which all are computed, and none is moved. In float32 on two CPU cores (H of
# 576, K of 7, D of 8,192) a step with room for 0.25 of the positions takes 0.51 of the time of one with all,
# with room for 0.5 0.73, for 0.875 0.97; for 0.94 it is 0.98, and single steps differ by as much.
DENSE = 0.9
CHUNK = 128  # capacities are multiples of this: a matmul's tile
MOST = 16  # chunks that the loss takes at once at most


def ahead(step: Any) -> Any:
    """How far an index's target is ahead of it at a TTT step, or at each of several."""
    return 1 + step


@dataclass(frozen=True)
class Capacity:
    """Static sizes of one data shard's compacted work: live indices and targets, and those of the steps from
    so many on where they compute a sample."""

    live: int
    targets: int
    samples: "tuple[tuple[int, Capacity], ...]" = ()


def counted_targets(
    segments_RT: np.ndarray, loss_mask_RT: np.ndarray, compat: str | None = None
) -> np.ndarray:
    """bool [R, T]: targets, the positions j whose next token j + 1 belongs to an answer of their document.

    `compat="specforge"` reproduces that trainer's mask, which is not moved at step 0: position j counts when
    the token *before* it, j - 1, is masked in.
    """
    counted = np.zeros(loss_mask_RT.shape, bool)
    same = (segments_RT[:, 1:] == segments_RT[:, :-1]) & (segments_RT[:, 1:] > 0)
    if compat == "specforge":
        counted[:, 1:] = same & (loss_mask_RT[:, :-1] > 0)
    else:
        counted[:, :-1] = same & (loss_mask_RT[:, 1:] > 0)
    return counted


def drafted_targets(counted_RT: np.ndarray, segments_RT: np.ndarray) -> np.ndarray:
    """bool [R, T]: the targets that an index predicts, which are all but the first positions of documents."""
    found = np.zeros(counted_RT.shape, bool)
    found[:, 1:] = counted_RT[:, 1:] & (segments_RT[:, 1:] == segments_RT[:, :-1])
    return found


def at_indices(flags_RT: np.ndarray, segments_RT: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """bool [R, T] for each step: the flag of every index's target; False where its document has none."""
    for by in map(ahead, range(steps)):
        found = np.zeros(flags_RT.shape, bool)
        same = (segments_RT[:, by:] == segments_RT[:, :-by]) & (segments_RT[:, by:] > 0)
        found[:, :-by] = flags_RT[:, by:] & same
        yield found


def live_queries(segments_RT: np.ndarray, counted_RT: np.ndarray, steps: int, first: int = 0) -> np.ndarray:
    """bool [R, T]: live indices, those with a counted target at one of the steps from `first` on."""
    return reduce(np.logical_or, islice(at_indices(counted_RT, segments_RT, steps), first, None))


def round_up(count: int) -> int:
    """Room for `count` targets: a multiple of CHUNK, at least one, that divides into parts of half of MOST
    chunks at least, so that the loss can take so many at once."""
    return _next(count, MOST // 2)


def _next(count: int, sizes: int) -> int:
    """The next multiple of CHUNK, at least one, of which there are so many between a number and its double:
    counts that differ by some percent, as those of two seeds do, share a program."""
    chunks = max(1, -(-count // CHUNK))
    step = max(1, (1 << (chunks - 1).bit_length()) // (2 * sizes))
    return -(-chunks // step) * step * CHUNK


def live_capacity(count: int, positions: int) -> int:
    """Room for `count` live indices of a shard: all of its positions where most are live."""
    room = _next(count, 16)
    return positions if room > DENSE * positions else room


def compact(mask_RT: np.ndarray, shards: int, capacity: int) -> np.ndarray:
    """int32 [shards * capacity]: flat indices of the set positions within each shard of rows, ascending.

    Free places hold the shard's number of positions, which every gather reads as zeros.
    """
    flat = mask_RT.reshape(shards, -1)
    out = np.full((shards, capacity), flat.shape[1], np.int32)
    for shard in range(shards):
        (found,) = np.nonzero(flat[shard])
        assert len(found) <= capacity, (len(found), capacity)
        out[shard, : len(found)] = found
    return out.reshape(-1)


def live_places(live_RT: np.ndarray, shards: int, capacity: int) -> np.ndarray:
    """The live indices, `compact`; all positions in their places where the capacity is all of a shard's.

    Then nothing has to be moved: those that are not live are computed, and count for nothing.
    """
    if capacity == live_RT.size // shards:
        return np.tile(np.arange(capacity, dtype=np.int32), shards)
    return compact(live_RT, shards, capacity)


def drafting_index(targets_M: jax.Array, steps: int) -> jax.Array:
    """int32 [M, K]: the flat index that predicts each target at each step, whether or not there is one."""
    by_K = np.array([ahead(step) for step in range(steps)], np.int32)
    return targets_M[:, None] - by_K[None]


def valid_targets(batch: Batch, steps: int) -> jax.Array:
    """bool [M, K]: whether a real target is predicted at a step, by an index of its own document that is on
    this chip."""
    n, (rows, T), own = batch.tokens.size, batch.tokens.shape, batch.aux_hidden.shape[1]
    document_n = (batch.segment_ids + (T + 1) * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(n)
    index_MK = drafting_index(batch.targets, steps)
    same_MK = (
        document_n.at[index_MK].get(mode="clip") == document_n.at[batch.targets].get(mode="clip")[:, None]
    )
    valid_MK = (batch.targets < n)[:, None] & (index_MK >= 0) & same_MK
    return valid_MK if own == T else valid_MK & (index_MK % T < own)


def slots(places_C: jax.Array, n: int) -> jax.Array:
    """int32 [n]: where in `places` a flat position stands; C where it does not."""
    C = places_C.shape[0]
    return jnp.full((n,), C, jnp.int32).at[places_C].set(jnp.arange(C, dtype=jnp.int32), mode="drop")


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index], zeros where that is out of range. `index` names a row once at most, `inverse` undoes it.

    So the gradient is a gather too. With autodiff's scatters the temporaries of `make bench`'s step are
    0.38 GB in place of 0.35.
    """
    return x.at[index].get(mode="fill", fill_value=0)


permute.defvjp(
    lambda x, index, inverse: (permute(x, index, inverse), inverse),
    lambda inverse, g: (g.at[inverse].get(mode="fill", fill_value=0), None, None),
)
