"""Batches of a store, read ahead of their use: each once, however many runs take it.

Dimensions: R rows of a split, B rows of a batch, T positions.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common import pod, zarr
from common.errors import EyasError
from common.mesh import ways
from common.rows import Rows
from common.stopping import awaited
from common.store import Store
from train.anchors import begins, changes, sampled
from train.batch import Batch, Inputs
from train.order import Order, Part, Reading
from train.stored import channels_of, decoded, teaching_arrays
from train.targets import Capacity, compact, counted_targets, live_places, live_queries
from train.workload import MASKING, Workload

MEMORY = 4.0  # GiB of a host for what is read ahead
_MOST_AHEAD, _READERS = 8, 4  # batches on a host, and those that are read at once
_INPUTS = ("tokens", "segment_ids", "positions", "loss_mask")


@dataclass(frozen=True)
class View:
    """What one run makes of the rows of a stream: which it takes, what of them counts, and what teaches."""

    order: Order
    workload: Workload
    capacity: Capacity
    teacher: str
    draft_ids: np.ndarray
    inputs: Inputs | None = None  # what the head reads of the store; None: all of its aux states
    parts: int = 1  # of a chip's rows, each of that capacity
    shares: tuple[float, ...] = ()  # of the targets that each step computes; all by default
    seed: int = 0  # of which they are


class _Read(NamedTuple):
    """What was read at once, on the host or on the mesh. `rows`: what all views share of it, by the names of
    arrays; `drafts`: logits by the draft vocabularies; `counts`: of every part that is complete, what of its
    batch counts."""

    rows: dict[str, Any]
    drafts: dict[int, Any]
    counts: list[dict[str, Any]]


class Stream:
    """Reads the rows of all views and puts them on the mesh, split by row, and by position where rows lie in
    pieces; each process reads whole rows, all those of which it has a piece.

    `waited` counts the seconds that its user waited for data.
    """

    def __init__(self, store: Store, mesh: Mesh, views: Sequence[View], memory: float = MEMORY):
        """What is read ahead takes `memory` GiB of this host at most. EyasError if that is too little."""
        self._store, self._views, self._rows = store, views, Rows(mesh, ("batch", "position"))
        assert all(view.workload.pieces == ways(mesh, "position") for view in views)
        taught = [teaching_arrays(store, view.teacher, self._inputs(view)) for view in views]
        self._names = tuple(dict.fromkeys((*_INPUTS, *(name for names in taught for name in names))))
        self._shown = [{*_INPUTS, *names, "row"} & {*Batch._fields} for names in taught]  # by view
        by_vocabulary = [view for view in views if view.teacher == "stored" and "topk_ids" not in self._names]
        self._vocabularies = {_vocabulary(view): view.draft_ids for view in by_vocabulary}
        self._channels = channels_of(store)
        self.waited = 0.0
        self._ahead = self._depth(memory)

    def _depth(self, memory: float) -> int:
        """How many batches the host has at once, with the one that goes to the devices next."""
        size = max(view.order.rows.shape[1] for view in self._views)
        rows = len(self._rows.own(np.arange(size)))
        kept = sum(self._store.row_bytes(name) for name in self._names)
        chosen = [len(ids) * 4 * self._store.length for ids in self._vocabularies.values()]
        batch = rows * (kept + sum(chosen))
        depth = int(memory * 2**30 / batch)
        if depth < 2:
            raise EyasError(
                f"{rows} rows of {self._store.url} are {batch / 2**30:.2g} GiB, and two such batches more "
                f"than the {memory:g} GiB for what is read ahead; give more --memory, or fewer --batch-rows"
            )
        return min(depth, _MOST_AHEAD)

    def reading(self, first: Sequence[int] | None = None) -> Reading:
        """What is to be read so that each view has its batches from this step on."""
        return Reading([view.order for view in self._views], first or [0] * len(self._views))

    def batches(
        self, reading: Reading | None = None, check: Callable[[], None] = lambda: None
    ) -> Iterator[list[tuple[int, Batch]]]:
        """The batches that are complete with each part of a reading, all by default, and the numbers of their
        views. The next rows are read while the last ones are used.

        `check` is called before each and while it is waited for, and may raise. What it raises on one
        process, and what one cannot read, is raised on all.
        """
        pending: dict[int, Batch] = {}
        pool = ThreadPoolExecutor(min(self._ahead, _READERS), thread_name_prefix="stream")
        ahead: deque[tuple[list[Part], Future]] = deque()
        try:
            for rows, parts in self.reading() if reading is None else reading:
                ahead.append((parts, pool.submit(self._load, rows, parts)))
                if len(ahead) == self._ahead:
                    yield self._deal(*self._next(ahead, check), pending)
            while ahead:
                yield self._deal(*self._next(ahead, check), pending)
        finally:  # at once: the store may be what does not answer
            pool.shutdown(wait=False, cancel_futures=True)

    def _next(
        self, ahead: deque[tuple[list[Part], Future]], check: Callable[[], None]
    ) -> tuple[list[Part], _Read]:
        """What was asked for first, on the mesh: the host keeps none of it."""
        start = time.monotonic()
        with pod.together():
            check()
            parts, request = ahead.popleft()
            found = awaited(request, check)
        by_row = {id(x): x for x in jax.tree.leaves((found.rows, found.drafts))}
        by_chip = {id(x): x for x in jax.tree.leaves(found.counts)}  # views may have the same
        on_devices = self._rows.place(list(by_row.values()), list(by_chip.values()))
        placed = dict(zip([*by_row, *by_chip], on_devices, strict=True))
        on_mesh = jax.tree.map(lambda x: placed[id(x)], found)
        self.waited += time.monotonic() - start
        return parts, on_mesh

    def _deal(self, parts: list[Part], read: _Read, pending: dict[int, Batch]) -> list[tuple[int, Batch]]:
        """The batches that are complete; `pending` keeps those of which rows are to come."""
        dealt, arrays = [], decoded(read.rows, self._channels)
        chosen = {}  # aux states, which views with the same layers share
        for part, counts in zip(parts, read.counts, strict=True):
            view = self._views[part.order]
            rows = {name: x for name, x in arrays.items() if name in self._shown[part.order]}
            if view.teacher == "stored" and read.drafts:
                rows["draft_logprobs"] = read.drafts[_vocabulary(view)]
            if (places := self._places(view)) not in chosen:
                chosen[places] = self._aux(arrays, places)
            rows["aux_hidden"] = chosen[places]
            batch = Batch(**dict.fromkeys(Batch._fields) | rows)
            if not part.whole:
                batch = _fill(pending.pop(part.order, None) or _empty(batch), batch, part.slots)
            if part.complete:
                dealt.append((part.order, batch._replace(**counts)))
            else:
                pending[part.order] = batch
        return dealt

    def _inputs(self, view: View) -> Inputs:
        return view.inputs or Inputs(tuple(self._store.features["aux_layers"]))

    def _places(self, view: View) -> tuple[int, ...] | None:
        """Where the store has the view's aux layers; None where they are just those."""
        stored, wanted = tuple(self._store.features["aux_layers"]), self._inputs(view).aux_layers
        return None if wanted == stored else tuple(map(stored.index, wanted))

    def _aux(self, arrays: dict[str, jax.Array], places: tuple[int, ...] | None) -> jax.Array:
        """The aux states of these places [B, T, A, H]; nothing is read for a view of none."""
        if places == ():
            like, hidden = arrays["argmax"], self._store.features["target"]["hidden_size"]
            return jnp.zeros((*like.shape, 0, hidden), jnp.bfloat16, device=like.sharding)
        return arrays["aux_hidden"] if places is None else _taken(arrays["aux_hidden"], places)

    def _load(self, rows: np.ndarray, parts: list[Part]) -> _Read:
        """On several processes each reads its own rows only."""
        own = self._rows.own(rows)
        found = self._read(own) | {"row": own.astype(np.int32)}
        masks = {name: found[name] for name in MASKING}
        draft, full = (found.pop(name, None) for name in ("draft_logprobs", "full_logprobs"))
        drafts = {}
        for key, ids in self._vocabularies.items():
            drafts[key] = draft if full is None else np.take(full, ids, axis=-1)
        del found["loss_mask"]
        return _Read(found, drafts, _shared(self._all_counts(parts, masks)))

    def _all_counts(self, parts: list[Part], masks: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """What of each complete batch counts; `masks` are those of the rows that were just read."""
        known: dict[Hashable, Any] = {}  # of the batch that was read, which many may have
        found = []
        for part in parts:
            view = self._views[part.order]
            if not part.complete:
                found.append({})
            elif part.whole:
                found.append(self._counts(view, part.step, masks, known))
            else:
                own = self._rows.own(view.order.rows[part.step])
                found.append(self._counts(view, part.step, self._read(own, MASKING), {}))
        return found

    def _counts(
        self, view: View, step: int, masks: dict[str, np.ndarray], known: dict[Hashable, Any]
    ) -> dict[str, Any]:
        """Of the batch of a step, with these masks; `known` keeps what is found by what it depends on."""
        shards, room, work = self._rows.chips * view.parts, view.capacity, view.workload
        kind = work.compat, work.ttt_steps

        def once(key: Hashable, make: Callable[..., Any], *given: Any) -> Any:
            if key not in known:
                known[key] = make(*given)
            return known[key]

        segments = masks["segment_ids"]
        targets = once(kind[:1], counted_targets, segments, masks["loss_mask"], kind[0])
        live = once(kind, lambda: self._by_chip(work.live(live_queries(segments, targets, kind[1]))))
        seen = kind if work.pieces > 1 else kind[:1]
        taught = once((*seen, "taught"), lambda: self._by_chip(work.taught(targets)))
        found = {
            "live": once((*kind, shards, room.live), live_places, live, shards, room.live),
            "targets": once((*seen, shards, room.targets, "at"), compact, taught, shards, room.targets),
            "count": once((*seen, shards, "count"), _summed, taught, shards),
        }
        if room.samples:
            key = *kind, shards, room.samples, view.shares, view.seed, step
            found["samples"] = once(key, self._samples, view, step, segments, targets, shards)
        return found

    def _samples(
        self, view: View, step: int, segments: np.ndarray, targets: np.ndarray, shards: int
    ) -> dict[int, dict[str, np.ndarray]]:
        """What is computed of the batch of a step where that is a sample, by the first of the rollout's steps
        that compute it."""
        begin = begins(self._rows.own(view.order.rows[step]), view.seed, step)
        found, shares, work = {}, changes(view.shares), view.workload
        for first, room in view.capacity.samples:
            sample = sampled(targets, shares[first], begin)
            live = live_queries(segments, sample, work.ttt_steps, first)
            live, taught = self._by_chip(work.live(live)), self._by_chip(work.taught(sample))
            found[first] = {
                "live": live_places(live, shards, room.live),
                "targets": compact(taught, shards, room.targets),
                "count": _summed(taught, shards),
            }
        return found

    def _by_chip(self, mask: np.ndarray) -> np.ndarray:
        """What each chip has of its rows, one chip behind the other."""
        return np.concatenate(self._rows.cut(mask))

    def _read(self, rows: np.ndarray, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Empty rows are zeros: they belong to no document."""
        (real,) = np.nonzero(rows >= 0)
        found = self._store.read(names or self._names, rows[real])
        if len(real) < len(rows):
            for name, values in found.items():
                found[name] = np.zeros((len(rows), *values.shape[1:]), values.dtype)
                found[name][real] = values
        return found


def _summed(targets_BT: np.ndarray, shards: int) -> np.ndarray:
    """int32 [shards]: how many targets each has."""
    return targets_BT.reshape(shards, -1).sum(1).astype(np.int32)


def _shared(tree: Any) -> Any:
    """The tree with one array in the place of all that are equal, so that it lies on the devices once."""
    known: dict[Hashable, np.ndarray] = {}
    return jax.tree.map(lambda x: known.setdefault((x.shape, x.dtype, x.tobytes()), x), tree)


@partial(jax.jit, static_argnums=1)
def _taken(x: jax.Array, places: tuple[int, ...]) -> jax.Array:
    """Some of the layers of [B, T, A, ...], which lie as x does."""

    def take(x: jax.Array) -> jax.Array:
        return jnp.stack([x[:, :, place] for place in places], 2)

    return jax.sharding.auto_axes(take, out_sharding=jax.typeof(x).sharding)(x)


def _vocabulary(view: View) -> int:
    return zarr.crc32(view.draft_ids)


def _empty(batch: Batch) -> Batch:
    return jax.tree.map(jnp.zeros_like, batch)


@partial(jax.jit, donate_argnums=0)
def _fill(batch: Batch, rows: Batch, slots: jax.Array) -> Batch:
    """The batch with `rows` in these places; those of the number of rows are left out."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # Rows may go to other chips, which only the compiler's own sharding does by itself.
        def scatter(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[slots].set(new, mode="drop")

        return jax.sharding.auto_axes(scatter, out_sharding=jax.typeof(old).sharding)(old, new)

    return jax.tree.map(put, batch, rows)
