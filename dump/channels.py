"""The scales of a store's channels, found once, from the states of its first rows.

They are kept in the manifest: whoever computes a block of the store, now or later, divides by the same bits.
"""

from collections.abc import Callable

import numpy as np

from common import pod
from common.channels import encode_channels
from common.errors import EyasError
from common.progress import note
from common.store import Store
from dump.plan import Plan
from dump.prefill import Prefill
from dump.rounds import INPUTS

_POSITIONS = 8_192  # at least, if there are so many; rows are shuffled, so the first are like all


def find_channels(
    plan: Plan, prefill: Prefill, check: Callable[[], None] = lambda: None
) -> dict[str, list[str]]:
    """The manifest's `channels`, the same on every process. `check` is called at every batch and may raise.

    EyasError if a state is not finite.
    """
    store, size = plan.store, plan.batch_rows
    count = min(store.rows, -(-_POSITIONS // store.length))
    note(f"dump: scales of channels, from the first {count} rows")
    total: dict[str, np.ndarray] = {}
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        with pod.together():
            check()
            inputs = _inputs(store, prefill.own(np.where(rows < count, rows, -1)))
        for name, squares in prefill.squares(*inputs).items():
            total[name] = total.get(name, 0.0) + squares.astype(np.float64)
    for name, squares in total.items():
        if not np.isfinite(squares).all():
            raise EyasError(
                f"the target's states ({name}) are not finite; check the weights, or use --dtype float32"
            )
    return encode_channels(total)


def _inputs(store: Store, rows: np.ndarray) -> list[np.ndarray]:
    """int32 [n, T] each; a row of -1 has no document."""
    (real,) = np.nonzero(rows >= 0)
    found = store.read(INPUTS, rows[real])
    whole = []
    for name in INPUTS:
        whole.append(np.zeros((len(rows), store.length), np.int32))
        whole[-1][real] = found[name]
    return whole
