"""Every byte of a store against its checksums."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from common import arrays
from common.errors import EyasError
from common.progress import Progress
from common.store import Store

_ROWS = 16  # rows held at once


def verify(url: str) -> dict[str, Any]:
    """Reads a whole store, with progress.

    Returns {"store": hash, "rows", "blocks" (committed), "missing_blocks", "bytes" (read), "damaged": [a
    line each]}. The store is sound and complete when nothing is damaged and no block is missing. EyasError
    if `url` is no store.
    """
    store = Store.open(url)
    described = store.manifest["rows"]["arrays"]
    checks = [store.index, *(partial(_rows_array, store, name) for name in described)]
    committed, missing = [], 0
    if "features" in store.manifest:
        committed = sorted(store.committed())
        missing = store.blocks - len(committed)
        checks += [partial(store.target_tensor, name) for name in ("embed_tokens", "lm_head") if committed]
        checks += [partial(_block, store, block) for block in committed]
    damaged, size = [], 0
    with Progress("verifying", len(checks), "part") as progress:
        for check in checks:
            read, problem = _attempt(check)
            size += read
            damaged += [problem] if problem else []
            progress.update(1, f"{size / 1e9:.2f} GB, {len(damaged)} damaged")
    return {
        "store": store.hash,
        "rows": store.rows,
        "blocks": len(committed),
        "missing_blocks": missing,
        "bytes": size,
        "damaged": damaged,
    }


def _attempt(check: Callable[[], Any]) -> tuple[int, str | None]:
    """(bytes read, what is wrong or None)."""
    try:
        found = check()
    except EyasError as error:
        return 0, str(error)
    return found if isinstance(found, int) else found.nbytes, None


def _rows_array(store: Store, name: str) -> int:
    described = store.manifest["rows"]["arrays"][name]
    return _compare(store, name, range(described["shape"][0]), described["crc32"])


def _block(store: Store, block: int) -> int:
    marker = store.commit(block)
    rows = store.block_range(block)
    return sum(_compare(store, name, rows, marker["crc32"][name]) for name in store.features["arrays"])


def _compare(store: Store, name: str, rows: range, expected: int) -> int:
    """The bytes of `name[rows]`; EyasError if they are not those that were written."""
    crc, size = 0, 0
    step = _ROWS if name != "token_counts" else len(rows)
    for start in range(rows.start, rows.stop, step):
        part = store.read_unchecked([name], np.arange(start, min(start + step, rows.stop)))[name]
        crc, size = arrays.crc32(part, crc), size + part.nbytes
    if crc != expected:
        raise EyasError(f"{store.url}: {name} rows {rows.start} to {rows.stop - 1} are not what was written")
    return size
