"""The compiled program of a dump: rows through the frozen target, and what the codec keeps of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.codec import encode_states
from common.mesh import sharding
from common.progress import note
from dump import target
from dump.plan import Plan
from dump.reduce_logits import chunk_length, reduce_logits


class Prefill:
    """The forward pass and codec for batches of one static shape, one batch over the chips of all processes.

    Called with this process's int32 [rows, T] tokens, segment ids and positions; returns what its own chips
    will hold of the results, before they are computed.
    """

    def __init__(self, plan: Plan, weights: dict[str, jax.Array]):
        whole = (plan.batch_rows, plan.store.length)
        self._shape, self._weights = whole, weights
        self._sharding = sharding(plan.mesh, ("row", None))
        # A chip has rows of its own, wherever the mesh put it: this process's rows go to its chips in order.
        places = self._sharding.addressable_devices_indices_map(whole)
        self._chips = sorted(places, key=lambda chip: places[chip][0].start or 0)
        on_chip = plan.batch_rows // plan.mesh.size
        self.rows = on_chip * len(self._chips)
        chunk = chunk_length(on_chip, plan.store.length, plan.target.vocab_size)
        note(f"dump: compiling for batches of {plan.batch_rows} x {plan.store.length} tokens")
        batch = jax.ShapeDtypeStruct(whole, jnp.int32, sharding=self._sharding)
        step = jax.jit(lambda weights, *batch: _encode(plan, chunk, weights, *batch))
        self._step = step.lower(weights, batch, batch, batch).compile()

    def __call__(self, *batch: np.ndarray) -> "Pending":
        return Pending(self._step(self._weights, *(self._spread(x) for x in batch)))

    def _spread(self, rows: np.ndarray) -> jax.Array:
        parts = np.split(rows, len(self._chips))
        held = [jax.device_put(part, chip) for part, chip in zip(parts, self._chips, strict=True)]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, held)


class Pending:
    """What a batch will give: {name: [rows, T, ...]} of this process's rows, on its way to the host."""

    def __init__(self, arrays: dict[str, jax.Array]):
        self._parts = {}
        for name, array in arrays.items():
            shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            self._parts[name] = [shard.data for shard in shards]
            for part in self._parts[name]:
                part.copy_to_host_async()

    def into(self, host: dict[str, np.ndarray]) -> None:
        """Waits for the batch and writes it into {name: [n <= rows, T, ...]}; what is beyond n is dropped."""
        for name, parts in self._parts.items():
            start, own = 0, host[name]
            for part in parts:
                stop = min(start + part.shape[0], len(own))
                if stop > start:
                    own[start:stop] = np.asarray(part)[: stop - start]
                start = stop


def _encode(plan: Plan, chunk: int, weights: dict[str, jax.Array], *batch: jax.Array) -> dict[str, Any]:
    """The forward pass and what the codec keeps of it, split by row."""

    def by_row(x: jax.Array) -> jax.Array:
        return jax.sharding.reshard(x, sharding(plan.mesh, ("row",) + (None,) * (x.ndim - 1)))

    aux_BTAH, last_BTH = target.forward(plan.target, weights, *batch, plan.config.aux_layers)

    def logits(last_BcH: jax.Array) -> jax.Array:
        # Parts of all rows' distributions become whole ones of some rows, which a chip reduces by itself.
        return by_row(target.logits(plan.target, weights, last_BcH))

    ids = None if plan.draft_ids is None else jnp.asarray(plan.draft_ids)
    found = encode_states(plan.codec, by_row(aux_BTAH), by_row(last_BTH))
    found |= reduce_logits(plan.codec, logits, last_BTH, ids, chunk)
    return {name: by_row(value) for name, value in found.items()}
