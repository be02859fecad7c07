"""The dump: rows through the frozen target, block by block, into the feature store.

The device is one batch ahead of the host, and the host one or two blocks ahead of the disk: a batch is
dispatched before the previous one is fetched, and a block is written in the background while the next one is
computed. Blocks are committed one by one, so a dump that was stopped or killed continues with the missing
ones, and, batches being cut from blocks, ends with the same bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common import storage
from common.codec import encode_states
from common.errors import EyasError, MachineError
from common.mesh import sharding
from common.progress import Progress, note
from common.stopping import Stop
from common.store import Store
from common.store_writer import FeatureWriter
from dump import target
from dump.config import DumpConfig
from dump.plan import Plan, make_plan
from dump.reduce_logits import chunk_length, reduce_logits
from dump.target_files import target_files, with_sums, write_target

__all__ = ["Discard", "DumpConfig", "Prefill", "run", "run_blocks"]

_INPUTS = ("tokens", "segment_ids", "positions")


class Writer(Protocol):
    """Takes finished blocks; `FeatureWriter` writes them."""

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> Any: ...


class Discard:
    """Takes blocks and drops them: what the same forward passes cost without writing."""

    def write(self, block: int, values: dict[str, np.ndarray], tokens: int, counted: int) -> None:
        """Does nothing."""


def run(config: DumpConfig) -> dict[str, Any]:
    """Dumps the features of `config.model` for the rows of `config.store`, or what is missing of them.

    Returns {"store", "rows", "blocks", "blocks_before", "tokens", "bytes", "seconds", "tokens_per_s"}, of
    this run but for rows and blocks. EyasError for whatever is wrong, before anything is computed or
    written where it can be known before, and after Ctrl-C or SIGTERM.
    """
    start = time.monotonic()
    with _resumable(config) as check:
        note(f"dump: checking {config.model} and {config.store}")
        plan = make_plan(config)
        note(_announce(plan))
        _run(plan, check)
    seconds = time.monotonic() - start
    tokens = sum(len(_block_rows(plan, block)) for block in plan.blocks) * plan.store.length
    total = -(-plan.store.rows // config.block_rows)
    return {
        "store": config.store,
        "rows": plan.store.rows,
        "blocks": total,
        "blocks_before": total - len(plan.blocks),
        "tokens": tokens,
        "bytes": plan.bytes,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def _run(plan: Plan, check: Callable[[], None]) -> None:
    if jax.process_count() == 1:
        for folder in ("", "commits", "target"):
            storage.remove_partial(f"{plan.config.store.rstrip('/')}/{folder}")
    files = cache(lambda: target_files(plan))
    if plan.blocks:
        weights = target.load(plan.config.model, plan.target, plan.mesh, jnp.dtype(plan.dtype))
        prefill = Prefill(plan, weights)
    features = with_sums(plan.features, files)
    with FeatureWriter(plan.config.store, features, plan.draft_ids) as writer:
        write_target(writer.store, files)
        if plan.blocks:
            run_blocks(plan, prefill, writer, check)
    lost = sorted(set(_own_blocks(plan)) - writer.store.committed())
    if lost:
        raise MachineError(
            f"{len(lost)} blocks of {plan.config.store} were written, but are not there (the first is "
            f"{lost[0]}): something else changes that folder; stop it and run the same command again"
        )


def _announce(plan: Plan) -> str:
    """The size of what is going to be written, before it is."""
    tokens = plan.store.rows * plan.store.length
    sizes = {
        n: np.prod(a["shape"]) * np.dtype(a["dtype"]).itemsize for n, a in plan.features["arrays"].items()
    }
    parts = ", ".join(f"{n} {size / tokens:.0f}" for n, size in sorted(sizes.items(), key=lambda x: -x[1]))
    blocks = -(-plan.store.rows // plan.config.block_rows)
    return (
        f"dump: {len(plan.blocks)} of {blocks} blocks to do, {tqdm.format_sizeof(plan.bytes, 'B')} to write; "
        f"{sum(sizes.values()) / tokens:.0f} bytes a token ({parts})"
    )


class Prefill:
    """The compiled forward pass and codec for batches of one static shape.

    Called with int32 [B, T] tokens, segment ids and positions on the host; returns {name: [B, T, ...]} arrays
    split by row over every chip, before they are computed.
    """

    def __init__(self, plan: Plan, weights: dict[str, jax.Array]):
        self.rows, length = plan.config.batch(plan.store.length), plan.store.length
        self._weights = weights
        self._sharding = sharding(plan.mesh, ("row", None))
        chips = plan.config.dp * plan.config.tp
        chunk = chunk_length(self.rows // chips, length, plan.target.vocab_size)
        note(f"dump: compiling for batches of {self.rows} x {length} tokens")
        batch = jax.ShapeDtypeStruct((self.rows, length), jnp.int32, sharding=self._sharding)
        step = jax.jit(lambda weights, *batch: _encode(plan, chunk, weights, *batch))
        self._step = step.lower(weights, batch, batch, batch).compile()

    def __call__(self, *batch: np.ndarray) -> dict[str, jax.Array]:
        found = self._step(self._weights, *(jax.device_put(x, self._sharding) for x in batch))
        for value in found.values():
            value.copy_to_host_async()
        return found


def _encode(plan: Plan, chunk: int, weights: dict[str, jax.Array], *batch: jax.Array) -> dict[str, jax.Array]:
    """The forward pass and what the codec keeps of it, split by row."""

    def by_row(x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, sharding(plan.mesh, ("row",) + (None,) * (x.ndim - 1)))

    aux_BTAH, last_BTH = target.forward(plan.target, weights, *batch, plan.aux_layers)

    def logits(last_BcH: jax.Array) -> jax.Array:
        # Parts of all rows' distributions become whole ones of some rows, which a chip reduces by itself.
        return by_row(target.logits(plan.target, weights, last_BcH))

    ids = None if plan.draft_ids is None else jnp.asarray(plan.draft_ids)
    found = encode_states(plan.codec, by_row(aux_BTAH), by_row(last_BTH))
    found |= reduce_logits(plan.codec, logits, last_BTH, ids, chunk)
    return {name: by_row(value) for name, value in found.items()}


def own_blocks(blocks: tuple[int, ...], process: int, processes: int) -> list[int]:
    """The blocks that a process computes and writes: b % processes == process."""
    return [block for block in blocks if block % processes == process]


def _block_rows(plan: Plan, block: int) -> range:
    size = plan.config.block_rows
    return range(block * size, min((block + 1) * size, plan.store.rows))


class _Block:
    """A block while it is computed: its rows' inputs, and the host arrays that the batches fill."""

    def __init__(self, plan: Plan, block: int):
        self.number, self.rows = block, _block_rows(plan, block)
        self.inputs = plan.store.read((*_INPUTS, "loss_mask"), self.rows)
        described = plan.features["arrays"].items()
        self.values = {n: np.empty((len(self.rows), *a["shape"][1:]), a["dtype"]) for n, a in described}

    def batch(self, start: int, size: int) -> list[np.ndarray]:
        """The inputs of rows start.. of the block; empty rows (segment 0) fill up a short batch."""
        parts = (self.inputs[name][start : start + size] for name in _INPUTS)
        return [np.pad(part, ((0, size - len(part)), (0, 0))) for part in parts]

    def fill(self, start: int, found: dict[str, jax.Array]) -> int:
        """Waits for a batch and copies it; returns its number of rows. EyasError if it is not finite."""
        for name, value in found.items():
            own = self.values[name][start:]
            count = min(len(own), value.shape[0])
            own[:count] = np.asarray(value)[:count]
        real = self.inputs["segment_ids"][start : start + count] > 0
        finite = np.isfinite(self.values["logsumexp"][start : start + count])
        if not finite[real].all():
            row = self.rows[start + int(np.argwhere(real & ~finite)[0, 0])]
            raise EyasError(
                f"row {row}: the target's logits are not finite; check the weights, or use --dtype float32"
            )
        return count

    def submit(self, writer: Writer) -> None:
        """Hands the block over."""
        tokens = int((self.inputs["segment_ids"] > 0).sum())
        writer.write(self.number, self.values, tokens, int(self.inputs["loss_mask"].sum(dtype=np.int64)))


class _Batch(NamedTuple):
    """A batch on the device: its block, its first row there, and the arrays to come."""

    block: _Block
    start: int
    arrays: dict[str, jax.Array]


def _own_blocks(plan: Plan) -> list[int]:
    return own_blocks(plan.blocks, jax.process_index(), jax.process_count())


def run_blocks(
    plan: Plan, prefill: Prefill, writer: Writer, check: Callable[[], None] = lambda: None
) -> None:
    """Computes the plan's missing blocks and hands each to `writer`, with progress in tokens.

    `writer` is a `FeatureWriter`, or `Discard` to time the forward passes alone. `check` is called between
    batches and may raise.
    """
    T, blocks = plan.store.length, _own_blocks(plan)
    total = sum(len(_block_rows(plan, block)) for block in blocks) * T
    with Progress("dump", total, "tok") as progress:
        for batch in _one_behind(_dispatch(plan, blocks, prefill)):
            check()
            count = batch.block.fill(batch.start, batch.arrays)
            progress.update(count * T)
            if batch.start + count == len(batch.block.rows):
                batch.block.submit(writer)


def _one_behind(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Each batch once its successor is dispatched: the device has work while the host fetches this one."""
    previous = None
    for current in batches:
        if previous is not None:
            yield previous
        previous = current
    if previous is not None:
        yield previous


def _dispatch(plan: Plan, blocks: list[int], prefill: Prefill) -> Iterator[_Batch]:
    """Every batch of every block, sent to the device when it is asked for."""
    for number in blocks:
        block = _Block(plan, number)
        for start in range(0, len(block.rows), prefill.rows):
            yield _Batch(block, start, prefill(*block.batch(start, prefill.rows)))


@contextmanager
def _resumable(config: DumpConfig) -> Iterator[Callable[[], None]]:
    """Turns a request to stop into one line, after what is being written has been committed."""
    try:
        with Stop(everywhere=True) as stop:
            yield stop.check
    except KeyboardInterrupt:
        done = len(Store.open(config.store).committed())
        raise EyasError(
            f"dump stopped; {done} blocks of {config.store} are committed: continue with the same command"
        ) from None
