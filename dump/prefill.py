"""One batch of rows through the frozen target and the codec: a program of one static shape.

It is compiled from shapes alone, so that it can be looked at for chips that are not there.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.codec import Codec, encode_states, square_sums
from common.compiling import compiler_options
from common.mesh import sharding, ways
from common.progress import note
from common.rows import Rows
from dump import target
from dump.plan import Plan
from dump.reduce_logits import chunk_length, reduce_logits


@dataclass(frozen=True)
class Program:
    """The forward pass of `rows` rows of `length` tokens, and what the codec keeps of it."""

    target: target.TargetConfig
    mesh: Mesh
    aux_layers: tuple[int, ...]
    codec: Codec
    draft_ids: np.ndarray | None
    rows: int
    length: int

    def compile(self, weights: dict[str, Any]) -> jax.stages.Compiled:
        """For `weights` or their shapes: (weights, scales of channels, tokens, segment ids, positions) ->
        ({name: [B, T, ...]}, {name: [B, ...]} of `square_sums`)."""
        batch = jax.ShapeDtypeStruct(
            (self.rows, self.length), jnp.int32, sharding=sharding(self.mesh, ("row", None))
        )
        lowered = jax.jit(self._run).lower(weights, self._channels(), batch, batch, batch)
        return lowered.compile(compiler_options=compiler_options(self.mesh, target.has_experts(self.target)))

    def _channels(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.codec.channels(len(self.aux_layers), self.target.hidden_size)
        where = sharding(self.mesh, ())
        return {n: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where) for n, shape in shapes.items()}

    def _run(
        self, weights: dict[str, jax.Array], channels: dict[str, jax.Array], *batch: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        def by_row(x: jax.Array) -> jax.Array:
            return jax.sharding.reshard(x, sharding(self.mesh, ("row",) + (None,) * (x.ndim - 1)))

        aux_BTAH, last_BTH = target.forward(self.target, weights, *batch, self.aux_layers)
        head = target.output_head(self.target, weights)

        def logits(last_BcH: jax.Array) -> jax.Array:
            # Parts of all rows' distributions become whole ones of some rows, which a chip reduces by itself.
            return by_row(head(last_BcH))

        ids = None if self.draft_ids is None else jnp.asarray(self.draft_ids)
        platform = self.mesh.devices.flat[0].platform
        chunk = chunk_length(self.rows // ways(self.mesh, "row"), self.length, platform)
        states = by_row(aux_BTAH), by_row(last_BTH)
        found = encode_states(self.codec, *states, channels)
        found |= reduce_logits(self.codec, logits, last_BTH, ids, chunk)
        squares = square_sums(self.codec, *states, by_row(batch[1]) > 0)
        return tuple({name: by_row(value) for name, value in x.items()} for x in (found, squares))


class Prefill:
    """The forward pass and codec for batches of one static shape, one batch over the chips of all processes.

    Called with this process's int32 [rows, T] tokens, segment ids and positions; returns what its own chips
    will hold of the results, before they are computed. `set_channels` comes first where the codec has scales
    of channels; until then they are one.
    """

    def __init__(self, plan: Plan, weights: dict[str, jax.Array]):
        whole = (plan.batch_rows, plan.store.length)
        self._weights = weights
        self._rows, self._mesh = Rows(plan.mesh), plan.mesh
        self.rows = plan.batch_rows // plan.mesh.size * self._rows.chips
        note(f"dump: compiling for batches of {plan.batch_rows} x {plan.store.length} tokens")
        about = plan.target, plan.mesh, plan.config.aux_layers, plan.codec, plan.draft_ids
        self._step = Program(*about, *whole).compile(weights)
        shapes = plan.codec.channels(len(plan.config.aux_layers), plan.target.hidden_size)
        self.set_channels({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
        # On every chip, whose host then has what all of them found.
        self._sum = jax.jit(
            lambda x: jax.tree.map(lambda part: part.sum(0), x), out_shardings=sharding(plan.mesh, ())
        )

    def set_channels(self, channels: dict[str, np.ndarray]) -> None:
        """What the states are divided by from now on, as `codec.decode_channels` gives it."""
        everywhere = sharding(self._mesh, ())
        self._channels = {
            name: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__)
            for name, x in channels.items()
        }

    def __call__(self, *batch: np.ndarray) -> "Pending":
        return Pending(self._step(self._weights, self._channels, *self._rows.place(batch))[0])

    def own(self, rows: np.ndarray) -> np.ndarray:
        """Those of a batch's rows that this process gives."""
        return self._rows.own(rows)

    def squares(self, *batch: np.ndarray) -> dict[str, np.ndarray]:
        """`codec.square_sums` over all rows of the batch, those of the other processes too."""
        _, squares = self._step(self._weights, self._channels, *self._rows.place(batch))
        return {name: np.asarray(x) for name, x in self._sum(squares).items()}


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
        """Waits for the batch and writes it into {name: [n <= rows, T, ...]}; what is beyond n, or of another
        name, is dropped."""
        for name, own in host.items():
            start = 0
            for part in self._parts[name]:
                stop = min(start + part.shape[0], len(own))
                if stop > start:
                    own[start:stop] = np.asarray(part)[: stop - start]
                start = stop
