"""Every byte of a store against its checksums."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from common import zarr
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
            damaged += [problem] if problem and problem not in damaged else []
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
    """The bytes of a whole array of rows; EyasError if they are not those that were written."""
    described = store.manifest["rows"]["arrays"][name]
    rows = described["shape"][0]
    crc, size = 0, 0
    for part in _parts(range(rows), rows if name == "token_counts" else _ROWS):
        found = store.read_unchecked([name], part)[name]
        crc, size = zarr.crc32(found, crc), size + found.nbytes
    if crc != described["crc32"]:
        raise EyasError(f"{store.url}: {name} is not what was written; prepare a new store")
    return size


def _block(store: Store, block: int) -> int:
    """The bytes of a block; reading compares them with the commit marker."""
    parts = _parts(store.block_range(block), _ROWS)
    return sum(store.read([name], part)[name].nbytes for name in store.features["arrays"] for part in parts)


def _parts(rows: range, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
