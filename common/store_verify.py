"""Every file of a store against its checksums."""

from collections.abc import Callable
from functools import partial
from typing import Any

from common import storage
from common.errors import EyasError
from common.manifest import COLUMNS
from common.progress import Progress
from common.store import Store

_BYTES = 256 << 20  # read at once


def verify(url: str) -> dict[str, Any]:
    """Reads a whole store, with progress.

    Returns {"store": hash, "rows", "blocks" (committed), "missing_blocks", "bytes" (read), "damaged": [a
    line each]}. The store is sound and complete when nothing is damaged and no block is missing. EyasError
    if `url` is no store, or its manifest is damaged.
    """
    store = Store.open(url)
    store.row_sums()  # there are as many rows as the manifest says: what follows has an end
    checks: list[Callable[[], int]] = [lambda: store.index().nbytes, lambda: store.token_counts().nbytes]
    checks += [partial(_rows, store, name, range(store.rows)) for name in COLUMNS]
    committed: list[int] = []
    missing = 0
    if "features" in store.manifest:
        committed = sorted(store.committed())
        missing = store.blocks - len(committed)
        checks += [partial(_marker, store, block) for block in committed]
        if committed:
            checks += [partial(_target_file, store, name) for name in store.features["target_files"]]
            checks.append(partial(_draft_ids, store))
        checks += [
            partial(_block, store, name, block) for block in committed for name in store.features["arrays"]
        ]
    checks.append(partial(_strangers, store, committed))
    damaged, size = [], 0
    with Progress("verifying", len(checks), "part") as progress:
        for check in checks:
            try:
                size += check()
            except EyasError as error:
                damaged += [str(error)] if str(error) not in damaged else []
            progress.update(1, f"{size / 1e9:.2f} GB, {len(damaged)} damaged")
    return {
        "store": store.hash,
        "rows": store.rows,
        "blocks": len(committed),
        "missing_blocks": missing,
        "bytes": size,
        "damaged": damaged,
    }


def _rows(store: Store, name: str, rows: range) -> int:
    """The bytes of an array's rows; reading compares each with its sum."""
    at_once = max(1, _BYTES // store.row_bytes(name))
    parts = (range(start, min(start + at_once, rows.stop)) for start in range(rows.start, rows.stop, at_once))
    return sum(store.read([name], part)[name].nbytes for part in parts)


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
