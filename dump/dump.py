"""The dump: rows through the frozen target, block by block, into the feature store.

One process decides what is missing and makes what is not there; all compute and write blocks, in rounds.
Blocks are committed one by one, so a dump that was stopped or killed continues with the missing ones.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common import pod, storage
from common.device_errors import device_errors
from common.errors import EyasError, MachineError
from common.progress import note
from common.stopping import Stop, stopped
from common.store import Store
from common.store_writer import FeatureWriter, create_features
from dump import target
from dump.channels import find_channels
from dump.config import DumpConfig
from dump.plan import Plan, make_plan
from dump.prefill import Prefill
from dump.rounds import run_rounds
from dump.target_files import target_files, with_sums, write_target

__all__ = ["DumpConfig", "run"]

_SMALLER = "compute less at a time (--chip-tokens, --batch-rows), or on more chips (--dp, --tp)"


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
        with device_errors(_SMALLER):
            _run(plan, check)
    seconds = time.monotonic() - start
    tokens = sum(len(plan.rows_of(block)) for block in plan.blocks) * plan.store.length
    part, parts = config.part()
    total = len(range(part, -(-plan.store.rows // config.block_rows), parts))
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
    url = plan.config.store.rstrip("/")
    with pod.together():
        if pod.is_first():
            for folder in ("", "target"):
                storage.remove_partial(f"{url}/{folder}")
        if plan.computes:
            weights = target.load(plan.config.model, plan.target, plan.mesh, jnp.dtype(plan.config.dtype))
    features = plan.features
    if plan.computes:
        prefill = Prefill(plan, weights)
        if plan.finds_channels:
            features = features | {"channels": find_channels(plan, prefill, check)}
    made = pod.told(lambda: _make(plan, features))
    with pod.together():
        _require_made(url, made)
        if plan.computes:
            prefill.set_channels(plan.channels(Store.open(url).features))
    with pod.together(), FeatureWriter(url) as writer:
        if plan.blocks:
            run_rounds(plan, prefill, writer, check)
    lost = pod.told(lambda: sorted(set(plan.blocks) - Store.open(url).committed()))
    if lost:
        raise MachineError(
            f"{len(lost)} blocks of {url} were written, but are not there (the first is {lost[0]}): "
            "something else changes that folder; stop it and run the same command again"
        )


def _make(plan: Plan, features: dict[str, Any]) -> str:
    """Makes of the store what is not there yet: the manifest's section, the arrays, target/. Its hash."""
    files = cache(lambda: target_files(plan))  # gigabytes: gone before blocks are computed
    features = with_sums(features, files)
    create_features(plan.config.store, features, plan.draft_ids)
    store = Store.open(plan.config.store)
    write_target(store, files)
    return store.hash


def _require_made(url: str, made: str) -> None:
    """EyasError if `url` is another place on this process's host than on the first one's."""
    if Store.open(url).hash != made:
        raise EyasError(
            f"{url} is not on this host what it is on the first one; name a gs:// prefix, or a folder that "
            "all hosts share"
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


@contextmanager
def _resumable(config: DumpConfig) -> Iterator[Callable[[], None]]:
    """Turns a request to stop into one line, after what is being written has been committed."""
    try:
        with Stop(everywhere=True) as stop:
            yield stop.check
    except KeyboardInterrupt as asked:
        text = f"dump stopped; what is committed in {config.store} stays: continue with the same command"
        raise stopped(asked, text) from None  # at once: the store may be what did not answer
