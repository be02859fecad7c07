"""Every file of a store against its checksums; log-probabilities against what they can be."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from common import stopping, storage
from common.codec import LOGPROBS
from common.errors import EyasError, RestartError
from common.manifest import COLUMNS
from common.progress import Progress
from common.store import Store

_BYTES = 256 << 20  # read at once by each of
_READERS = 3  # checks of numbers at a time: one is read while another's sums are computed
_SMALL_READERS = 32  # markers at a time


def verify(url: str) -> dict[str, Any]:
    """Reads a whole store, with progress.

    Returns {"store": hash, "rows", "blocks" (committed), "missing_blocks", "bytes" (read), "damaged": [a
    line each]}. The store is sound and complete when nothing is damaged and no block is missing. EyasError
    if `url` is no store, or its manifest is damaged; RestartError if a server does not answer.
    """
    store = Store.open(url)
    store.row_sums()  # there are as many rows as the manifest says: what follows has an end
    small: list[Callable[[], int]] = []
    checks: list[Callable[[], int]] = [lambda: store.index().nbytes, lambda: store.token_counts().nbytes]
    checks += [partial(_rows, store, name, range(store.rows)) for name in COLUMNS]
    committed: list[int] = []
    missing = 0
    if "features" in store.manifest:
        committed = sorted(store.committed())
        missing = store.blocks - len(committed)
        small += [partial(_marker, store, block) for block in committed]
        if committed:
            checks += [partial(_target_file, store, name) for name in store.features["target_files"]]
            checks.append(partial(_draft_ids, store))
        checks += [
            partial(_block, store, name, block) for block in committed for name in store.arrays_in(block)
        ]
    checks.append(partial(_strangers, store, committed))
    damaged: dict[str, None] = {}  # in the order in which they were found
    size = 0
    with Progress("verifying", len(small) + len(checks), "part") as progress:
        for some, readers in ((small, _SMALL_READERS), (checks, _READERS)):
            pool = ThreadPoolExecutor(readers, thread_name_prefix="verify")
            try:
                for outcome in [pool.submit(_outcome, check) for check in some]:
                    read, problem = stopping.awaited(outcome, stopping.check)
                    size += read
                    damaged |= dict.fromkeys(problem)
                    progress.update(1, f"{size / 1e9:.2f} GB, {len(damaged)} damaged")
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # a server may not answer for minutes
    return {
        "store": store.hash,
        "rows": store.rows,
        "blocks": len(committed),
        "missing_blocks": missing,
        "bytes": size,
        "damaged": list(damaged),
    }


def _outcome(check: Callable[[], int]) -> tuple[int, list[str]]:
    """(the bytes that were read, what is wrong with them if anything is)."""
    try:
        return check(), []
    except RestartError:
        raise  # every other check would wait as long
    except EyasError as error:
        return 0, [str(error)]


def _rows(store: Store, name: str, rows: range) -> int:
    """The bytes of an array's rows; reading compares each with its sum."""
    at_once = max(1, _BYTES // store.row_bytes(name))
    parts = (range(start, min(start + at_once, rows.stop)) for start in range(rows.start, rows.stop, at_once))
    read = _log_probabilities if name.endswith(LOGPROBS) else _any_numbers
    return sum(read(store, name, part) for part in parts)


def _any_numbers(store: Store, name: str, rows: range) -> int:
    return store.read([name], rows)[name].nbytes


def _log_probabilities(store: Store, name: str, rows: range) -> int:
    """EyasError where those of a document are not finite or above 0, or the largest k are out of order."""
    read = store.read([name, "segment_ids"], rows)
    found = read[name]
    wrong = ~(np.isfinite(found) & (found <= 0)).all(-1)
    if name.startswith("topk"):
        wrong |= (found[..., 1:] > found[..., :-1]).any(-1)
    wrong &= read["segment_ids"] > 0
    if wrong.any():
        raise EyasError(
            f"{store.url}: {name} of row {rows[int(wrong.any(1).argmax())]} is not finite, above 0 or out of "
            "order, so no log-probabilities; make another store with prepare and dump"
        )
    return found.nbytes


def _marker(store: Store, block: int) -> int:
    store.commit(block)
    return 0


def _block(store: Store, name: str, block: int) -> int:
    """The bytes of an array's block; reading compares each row with the block's marker."""
    return _rows(store, name, store.block_range(block))


def _target_file(store: Store, name: str) -> int:
    return len(store.target_file(name))


def _draft_ids(store: Store) -> int:
    ids = store.draft_ids()
    return 0 if ids is None else ids.nbytes


def _strangers(store: Store, committed: list[int]) -> int:
    """EyasError for a marker in commits/ of a block that the store does not have."""
    names = {name for name in storage.list_names(f"{store.url}/commits") if name.endswith(".json")}
    others = sorted(names - {f"{block:06d}.json" for block in committed})
    if others:
        raise EyasError(f"{store.url}/commits/{others[0]} is no block's of this store; delete it")
    return 0
