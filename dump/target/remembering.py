"""A pass over sequences whose past lies in a cache: what layers keep there, and what they find.

A cache is {name: array [R, B, ...]}: a name is "g.p.LOCAL", as a weight's is, R the repeats of group g, B
sequences. LOCAL names what the attention of the layer declares in `remembers`: keys and values by position
[S, ...], or a state that changes.

Dimensions: b of the cache's B sequences, T positions of the pass, S places of the cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.cached_attention import New, Tree, attend_to_cache
from dump.target.spec import Context

Past = Callable[[jax.Array, int], jax.Array]
"""(start, S) -> what is remembered [B, S, ...] in the places from `start` on."""


class Remembering(Context):
    """The context of a pass that writes into a cache.

    `starts_b`: position of each sequence's first token. `lengths_b`: where sequences begin with this pass,
    how many of its tokens are theirs; the others only fill the batch. None: they go on behind what the cache
    holds. `slots_b`: which of the cache's sequences they are, None for all of them, in order. `tree`: the
    tokens are one, all of its places are theirs; None: a sequence.
    """

    def __init__(
        self,
        tokens_bT: jax.Array,
        starts_b: jax.Array,
        lengths_b: jax.Array | None = None,
        slots_b: jax.Array | None = None,
        tree: Tree | None = None,
    ):
        b, T = tokens_bT.shape
        offsets_1T = jnp.arange(T, dtype=jnp.int32)[None]
        self.new = New.behind(starts_b, T)
        if tree is not None:
            self.new = self.new._replace(positions_Bm=starts_b[:, None] + tree.depths_BM, tree=tree)
        self.starts_b, self.lengths_b = starts_b, lengths_b
        self.slots_b = jnp.arange(b, dtype=jnp.int32) if slots_b is None else slots_b
        own_bT = offsets_1T < (T if lengths_b is None else lengths_b[:, None])
        segments_bT = jnp.broadcast_to(own_bT.astype(jnp.int32), (b, T))
        super().__init__(segments_bT, self.new.positions_Bm, None)

    def remember(self, name: str, x_bTX: jax.Array) -> Past | None:
        """Writes what is new to its places; returns what reads all places, None where all is new.

        What lies behind the cache's end is not written.
        """
        place = (self.repeat, self.slots_b[:, None], self.new.places_Bm)
        held = self.cache[name].at[place].set(x_bTX.astype(self.cache[name].dtype), mode="drop")
        self.cache = self.cache | {name: held}
        if self.lengths_b is not None:
            return None

        def read(start: jax.Array, size: int) -> jax.Array:
            whole = held.shape[1], size, *held.shape[3:]
            at = self.repeat, 0, start, *(0,) * len(held.shape[3:])
            return jax.lax.dynamic_slice(held, at, (1, *whole)).reshape(whole)

        return read

    def recall(self, name: str) -> jax.Array:
        """A state [b, ...] as the last pass left it."""
        return self.cache[name][self.repeat, self.slots_b]

    def keep(self, name: str, x: jax.Array) -> None:
        """Leaves a state [b, ...] to the next pass."""
        held = self.cache[name]
        self.cache = self.cache | {name: held.at[self.repeat, self.slots_b].set(x.astype(held.dtype))}

    def attend(self, q_BTNd, k_BTJd, v_BTJe, scale, window=None, sinks_N=None) -> jax.Array:
        keys, values = self.remember("k", k_BTJd), self.remember("v", v_BTJe)
        if keys is None:
            return super().attend(q_BTNd, k_BTJd, v_BTJe, scale, window, sinks_N)

        def read(start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
            return keys(start, size), values(start, size)

        length = self.cache["k"].shape[2]
        return attend_to_cache(q_BTNd, read, length, self.new, scale, window, sinks_N)
