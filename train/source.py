"""A complete store on a mesh: what all runs from it share is read once, and lies on the devices once."""

import hashlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common import zarr
from common.mesh import make_mesh, sharding, ways
from common.row_cache import RowCache, parse
from common.store import Store, tensor_file
from train import placing
from train.batch import Frozen, Inputs
from train.order import share_of
from train.sample import Sample, measure
from train.stream import MEMORY
from train.workload import Workload

Value = TypeVar("Value")


class Source:
    """`train_rows` and `test_rows` are those of the splits. What is asked for again is not read again."""

    def __init__(self, url: str, dp: int = 1, cache: str | None = None, memory: float = MEMORY, sp: int = 1):
        """EyasError if the store is no complete one, or there are fewer than `dp * sp` devices. `cache`:
        FOLDER:SIZE, see common/row_cache.py; `memory`: GiB for what is read ahead; `sp`: chips that share a
        row."""
        self.memory = memory
        self.store = Store.open(url, RowCache(*parse(cache)) if cache else None)
        self.store.features  # noqa: B018 (says so where no dump has started)
        self.store.require_complete()
        self.mesh = make_mesh(dp, sp, "sp")
        self.train_rows, self.test_rows = self.store.split_rows("train"), self.store.split_rows("test")
        self._kept: dict[Hashable, Any] = {}

    @property
    def groups(self) -> int:
        """How many rows are computed at once, each on a chip, or in pieces on several."""
        return ways(self.mesh, "batch")

    @property
    def pieces(self) -> int:
        """How many chips share a row."""
        return ways(self.mesh, "position")

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What `make` gave for this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def program(self, lowered: Any, compile: Callable[[], Callable]) -> Callable:
        """What `compile` makes of a lowered program; of one that is the same to the letter, that one's."""
        text = hashlib.sha256(lowered.as_text().encode()).digest()
        return self.once(("program", text), compile)

    def rows(self, seed: int, share: float) -> np.ndarray:
        """A share of the train split's rows."""
        return self.once(("rows", seed, share), lambda: share_of(self.train_rows, seed, share))

    def workload(self, ttt_steps: int, compat: str | None = None, test: bool = False) -> Workload:
        """Of the train split, or of the test split."""
        rows = self.test_rows if test else self.train_rows
        return self.once(
            ("workload", ttt_steps, compat, test),
            lambda: Workload(self.store, rows, ttt_steps, compat, self.pieces),
        )

    def sample(
        self,
        workload: Workload,
        seed: int,
        share: float,
        inputs: Inputs,
        eps: float,
        fitted: bool,
        dtype: Any,
    ) -> Sample:
        """What a head is told of its target before it trains: the same for all seeds of heads."""
        of = self.store, self.mesh, workload, self.rows(seed, share)
        # Of a rollout's steps a sum knows by the halo behind a piece, whose room decides on its rounding.
        rounded = workload.compat, workload.ttt_steps if self.pieces > 1 else 1, str(dtype)
        return self.once(
            ("sample", *rounded, seed if share < 1 else 0, share, inputs, eps, fitted),
            lambda: measure(*of, self.embed(dtype) if fitted else None, eps, inputs),
        )

    def _name(self, tensor: str) -> str:
        """What to read for a matrix: where the two are tied there is one, of which no second copy is read."""
        return tensor if tensor_file(tensor) in self.store.features["target_files"] else "embed_tokens"

    def _tensor(self, name: str) -> np.ndarray:
        return self.once(name, lambda: self.store.target_tensor(name))

    def forget_tensors(self) -> None:
        """Frees the host's copies of the target's matrices, which are gigabytes."""
        for name in ("embed_tokens", "lm_head"):
            self._kept.pop(name, None)

    def embed(self, dtype: Any) -> jax.Array:
        """The target's embedding [V, H], divided by columns over the chips."""

        def make() -> jax.Array:
            found = self._tensor("embed_tokens")
            axes = placing.frozen_axes(Frozen(found, None, found), self.mesh)
            return placing.place(found, sharding(self.mesh, axes.embed), dtype)

        return self.once(("embed", jnp.dtype(dtype)), make)

    def rows_of(self, tensor: str, draft_ids: np.ndarray, dtype: Any) -> jax.Array:
        """The rows [D, H] of a draft vocabulary of "lm_head" or "embed_tokens", divided over the chips."""
        name = self._name(tensor)

        def make() -> jax.Array:
            found = self._tensor(name)[draft_ids]
            axes = placing.frozen_axes(Frozen(found, found, found), self.mesh)
            return placing.place(found, sharding(self.mesh, axes.lm_head), dtype)

        return self.once((name, jnp.dtype(dtype), zarr.crc32(draft_ids)), make)

    def frozen(self, draft_ids: np.ndarray, teacher: str, dtype: Any) -> Frozen:
        """What a head takes from the target."""

        def index() -> jax.Array:
            found = np.full(self.store.features["target"]["vocab_size"], -1, np.int32)
            found[draft_ids] = np.arange(len(draft_ids))
            return placing.place(found, sharding(self.mesh, (None,)))

        rows = self.rows_of("lm_head", draft_ids, dtype) if teacher == "recompute" else None
        return Frozen(self.embed(dtype), rows, self.once(("index", zarr.crc32(draft_ids)), index))
