"""Batches of a store, in an order that is a function of seed and step alone, read ahead of their use.

A step's rows do not depend on what was read before or on the number of processes, so resuming is free and a
batch can be replayed. Dimensions: R rows of a split, B rows of a batch, T positions.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from common.codec import arrays_of
from common.errors import EyasError
from common.mesh import sharding
from common.store import Store
from train.batch import Batch
from train.targets import Capacity, compact, counted_targets, live_queries, round_up

AHEAD = 3  # batches in flight: one in use by the device, one ready, one being read
_MASKS = 4096  # rows whose masks are looked at together
_INPUTS = ("tokens", "segment_ids", "positions", "loss_mask")


def order(rows: np.ndarray, seed: int, steps: int, batch_rows: int) -> np.ndarray:
    """int64 [steps, B]: the rows of every step. Each epoch is a permutation of its own, and batches run on
    over its end, so that no row is left out. Fewer steps give a prefix."""
    count = steps * batch_rows
    epochs = [
        # Philox: numpy promises its stream for ever, unlike that of default_rng.
        rows[np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(rows))]
        for epoch in range(-(-count // len(rows)))
    ]
    return np.concatenate(epochs)[:count].reshape(steps, batch_rows)


class Workload:
    """Which positions of every row are computed (see train/targets.py), from the store's masks alone."""

    def __init__(self, store: Store, rows: np.ndarray, ttt_steps: int, compat: str | None = None):
        self.ttt_steps, self.compat = ttt_steps, compat
        self._live, self._targets = np.zeros((2, store.rows), np.int64)
        for start in range(0, len(rows), _MASKS):
            part = rows[start : start + _MASKS]
            found = store.read(("segment_ids", "loss_mask"), part)
            live, targets = self.masks(found["segment_ids"], found["loss_mask"])
            self._live[part], self._targets[part] = live.sum(1), targets.sum(1)
        self.counted = int(self._targets[rows].sum())

    def masks(self, segments_BT: np.ndarray, loss_mask_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [B, T] each: live queries, counted targets."""
        targets = counted_targets(segments_BT, loss_mask_BT, self.compat)
        return live_queries(segments_BT, targets, self.ttt_steps), targets

    def capacity(self, batches: np.ndarray, shards: int) -> Capacity:
        """What the fullest shard of `batches` int64 [n, B] needs."""
        parts = batches.reshape(len(batches) * shards, -1)
        live, targets = (counts[parts].sum(1).max() for counts in (self._live, self._targets))
        return Capacity(round_up(int(live)), round_up(int(targets)))


def teaching_arrays(store: Store, teacher: str) -> tuple[str, ...]:
    """The feature arrays that a trainer reads. EyasError if the store has no stored logits to teach with."""
    features = store.features
    states = ("aux_hidden", "last_hidden") if teacher == "recompute" else ("aux_hidden",)
    names = ("argmax", "logsumexp", *arrays_of(features["precision"], *states))
    if teacher == "recompute":
        return names
    codec = features["codec"]["name"]
    if codec not in ("topk", "draft", "full"):
        raise EyasError(
            f"{store.url} has no logits to teach with (codec {codec}); use --teacher recompute, or dump with "
            "--logits topk, draft or full"
        )
    return (*names, *(("topk_logits", "topk_ids") if codec == "topk" else (f"{codec}_logits",)))


class Stream:
    """Reads batches of `rows` int64 [B] and puts them on the mesh, split by row over every chip.

    `waited` counts the seconds that its user waited for data. A row of -1 is empty: it fills up a batch.
    """

    def __init__(
        self,
        store: Store,
        workload: Workload,
        capacity: Capacity,
        mesh: Mesh,
        teacher: str,
        draft_ids: np.ndarray,
    ):
        self._store, self._workload, self._capacity, self._mesh = store, workload, capacity, mesh
        self._names = teaching_arrays(store, teacher)
        self._draft_ids = draft_ids
        self.waited = 0.0

    def batches(self, wanted: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The batches of `wanted`, in order; the next ones are read while one is used."""
        with ThreadPoolExecutor(AHEAD - 1, thread_name_prefix="stream") as pool:
            ahead: deque[Future] = deque()
            try:
                for rows in wanted:
                    ahead.append(pool.submit(self.load, rows))
                    if len(ahead) == AHEAD:
                        yield self._next(ahead)
                while ahead:
                    yield self._next(ahead)
            finally:
                for request in ahead:
                    request.cancel()

    def _next(self, ahead: deque[Future]) -> Batch:
        start = time.monotonic()
        batch = ahead.popleft().result()
        self.waited += time.monotonic() - start
        return batch

    def load(self, rows: np.ndarray) -> Batch:
        """One batch, on the mesh. On several processes each reads its own rows only."""
        shards = self._mesh.size
        mine = np.array_split(rows, jax.process_count())[jax.process_index()]
        found = self._read(mine)
        live, targets = self._workload.masks(found["segment_ids"], found.pop("loss_mask"))
        local = shards // jax.process_count()
        if (logits := found.pop("full_logits", None)) is not None:
            found["draft_logits"] = np.take(logits, self._draft_ids, axis=-1)
        found |= {
            "live": compact(live, local, self._capacity.live),
            "targets": compact(targets, local, self._capacity.targets),
            "count": targets.reshape(local, -1).sum(1).astype(np.int32),
        }
        return Batch(**dict.fromkeys(Batch._fields) | {n: self._put(x) for n, x in found.items()})

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        real = rows >= 0
        found = self._store.read((*_INPUTS, *self._names), np.maximum(rows, 0))
        if not real.all():
            found["segment_ids"] = found["segment_ids"] * real[:, None]
        return found

    def _put(self, local: np.ndarray) -> jax.Array:
        where = sharding(self._mesh, ("row",) + (None,) * (local.ndim - 1))
        return jax.make_array_from_process_local_data(where, local)
