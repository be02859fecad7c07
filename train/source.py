"""A complete store on a mesh: what all runs from it share is read once, and lies on the devices once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common import zarr
from common.mesh import make_mesh, sharding
from common.store import Store
from train.batch import Frozen
from train.order import share_of
from train.sample import Sample, measure
from train.stream import Workload

Value = TypeVar("Value")


class Source:
    """`train_rows` and `test_rows` are those of the splits. What is asked for again is not read again."""

    def __init__(self, url: str, dp: int = 1):
        """EyasError if the store is no complete one, or there are fewer than `dp` devices."""
        self.store = Store.open(url)
        self.store.features  # noqa: B018 (says so where no dump has started)
        self.store.require_complete()
        self.mesh = make_mesh(dp)
        self.train_rows, self.test_rows = self.store.split_rows("train"), self.store.split_rows("test")
        self._kept: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def rows(self, seed: int, share: float) -> np.ndarray:
        """A share of the train split's rows."""
        return self._once(("rows", seed, share), lambda: share_of(self.train_rows, seed, share))

    def workload(self, ttt_steps: int, compat: str | None = None, test: bool = False) -> Workload:
        """Of the train split, or of the test split."""
        rows = self.test_rows if test else self.train_rows
        return self._once(
            ("workload", ttt_steps, compat, test), lambda: Workload(self.store, rows, ttt_steps, compat)
        )

    def sample(self, seed: int, share: float, eps: float, fitted: bool) -> Sample:
        """What a head is told of its target before it trains."""
        return self._once(
            ("sample", seed, share, eps, fitted),
            lambda: measure(self.store, self.rows(seed, share), seed, eps, fitted),
        )

    def frozen(self, draft_ids: np.ndarray, teacher: str, dtype: Any) -> Frozen:
        """What a head takes from the target, on every chip."""
        everywhere = sharding(self.mesh, ())
        ids = zarr.crc32(draft_ids)

        def embed() -> jax.Array:
            return jax.device_put(self.store.target_tensor("embed_tokens").astype(dtype), everywhere)

        def lm_head() -> jax.Array:
            return jax.device_put(self.store.target_tensor("lm_head")[draft_ids].astype(dtype), everywhere)

        def index() -> jax.Array:
            found = np.full(self.store.features["target"]["vocab_size"], -1, np.int32)
            found[draft_ids] = np.arange(len(draft_ids))
            return jax.device_put(found, everywhere)

        dtype = jnp.dtype(dtype)
        return Frozen(
            self._once(("embed", dtype), embed),
            self._once(("lm_head", dtype, ids), lm_head) if teacher == "recompute" else None,
            self._once(("index", ids), index),
        )
