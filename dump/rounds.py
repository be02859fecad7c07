"""Blocks are computed in rounds that all processes share, each on rows of its own blocks.

The missing blocks are dealt out by their place in the list. A round is one batch over the chips of all
processes, put together from every process's own rows; a process that has run out adds empty ones. So no two
processes write one object, and none holds what another needs.

Whatever can fail on one process alone (reading rows, writing blocks, a number that is not finite, a request
to stop) is met before a round is dispatched, and agreed on. The devices are some batches ahead of the host
meanwhile, and the host some blocks ahead of the disk.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np

from common import pod
from common.errors import EyasError
from common.progress import Progress
from dump.plan import Plan
from dump.prefill import Pending, Prefill

_AHEAD = 2  # batches on the devices: one that runs, one that waits
INPUTS = ("tokens", "segment_ids", "positions")


class Writer(Protocol):
    """Takes finished blocks; `FeatureWriter` writes them."""

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> Any: ...


class Discard:
    """Takes blocks and drops them: what the same forward passes cost without writing."""

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> None:
        """Does nothing."""


class _Batch(NamedTuple):
    """`count` rows of a block, from its row `start` on."""

    block: int
    start: int
    count: int


def deal(blocks: tuple[int, ...], process: int, processes: int) -> tuple[int, ...]:
    """The blocks that a process computes and writes: every `processes`-th of those that are missing."""
    return blocks[process::processes]


def run_rounds(
    plan: Plan, prefill: Prefill, writer: Writer, check: Callable[[], None] = lambda: None
) -> None:
    """Computes the plan's missing blocks and hands each to `writer`, with progress in tokens of all.

    `writer` is a `FeatureWriter`, or `Discard` to time the forward passes alone. `check` is called in every
    round and may raise, which ends the rounds of all processes.
    """
    T, rows = plan.store.length, pod.exchange(prefill.rows)
    shares = (_batches(plan, deal(plan.blocks, p, len(rows)), own) for p, own in enumerate(rows))
    blocks = _Blocks(plan, writer)
    pending: deque[tuple[_Batch | None, Pending]] = deque()
    with Progress("dump", sum(len(plan.rows_of(b)) for b in plan.blocks) * T, "tok") as progress:
        for batches in zip_longest(*shares):
            with pod.together():
                check()
                if len(pending) == _AHEAD:
                    blocks.fill(*pending.popleft())
                inputs = blocks.inputs(batches[pod.index()], prefill.rows)
                progress.update(sum(batch.count for batch in batches if batch) * T)
            pending.append((batches[pod.index()], prefill(*inputs)))
        with pod.together():
            for found in pending:
                check()
                blocks.fill(*found)


def _batches(plan: Plan, blocks: tuple[int, ...], size: int) -> Iterator[_Batch]:
    for block in blocks:
        rows = len(plan.rows_of(block))
        for start in range(0, rows, size):
            yield _Batch(block, start, min(size, rows - start))


class _Blocks:
    """This process's blocks while they are computed."""

    def __init__(self, plan: Plan, writer: Writer):
        self._plan, self._writer = plan, writer
        self._open: dict[int, _Block] = {}

    def inputs(self, batch: _Batch | None, size: int) -> list[np.ndarray]:
        """int32 [size, T] tokens, segment ids and positions; rows without a document where there are none."""
        if batch is None:
            return [np.zeros((size, self._plan.store.length), np.int32) for _ in INPUTS]
        if batch.start == 0:
            self._open[batch.block] = _Block(self._plan, batch.block)
        own = self._open[batch.block].inputs
        parts = (own[name][batch.start : batch.start + batch.count] for name in INPUTS)
        return [np.pad(part, ((0, size - batch.count), (0, 0))) for part in parts]

    def fill(self, batch: _Batch | None, found: Pending) -> None:
        """Waits for a batch; hands its block over if that is whole. EyasError if a logit is not finite."""
        if batch is None:
            return
        block = self._open[batch.block]
        block.fill(batch, found)
        if batch.start + batch.count == len(block.rows):
            del self._open[batch.block]
            tokens = int((block.inputs["segment_ids"] > 0).sum())
            counted = int(block.inputs["loss_mask"].sum(dtype=np.int64))
            self._writer.write(batch.block, block.values, tokens, counted)


class _Block:
    """A block's inputs, and the host arrays that its batches fill."""

    def __init__(self, plan: Plan, block: int):
        self.rows = plan.rows_of(block)
        self.inputs = plan.store.read((*INPUTS, "loss_mask"), self.rows)
        self._described = plan.features["arrays"]
        self.values: dict[str, np.ndarray] = {}

    def fill(self, batch: _Batch, found: Pending) -> None:
        if not self.values:  # only now: of the blocks that are computed, one is filled at a time
            rows = len(self.rows)
            self.values = {
                n: np.empty((rows, *a["shape"][1:]), a["dtype"])
                for n, a in self._described.items()
                if self.rows.start < a["shape"][0]
            }
        here = slice(batch.start, batch.start + batch.count)
        found.into({name: value[here] for name, value in self.values.items()})
        real = self.inputs["segment_ids"][here] > 0
        finite = np.isfinite(self.values["logsumexp"][here])
        if not finite[real].all():
            row = self.rows[batch.start + int(np.argwhere(real & ~finite)[0, 0])]
            raise EyasError(
                f"row {row}: the target's logits are not finite; check the weights, or use --dtype float32"
            )
