"""Mixture of experts at the cost of the active ones: tokens sorted by expert, matmuls in groups.

Shapes are static and no token is dropped: M tokens make M * k rows, whatever the experts they go to.
Experts are split over the chips by their columns ("ffn"), or whole ("expert").

Dimensions: M tokens, k experts a token, S = M * k sorted rows, E experts held by this chip, F their width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from common.errors import EyasError
from common.layers import linear, precision
from dump.target.dense import ACTIVATIONS, Dense, must_divide
from dump.target.routing import Router
from dump.target.spec import Context, TargetConfig, Weight

EXPERTS = "mlp.experts"
SORTED_VALUES = 5 << 28  # the most that S * H may be at once: 2.5 GiB in bfloat16, and twice that of results
BLOCKS = 8  # in which a chip computes an average share of the rows; only the last is partly wasted
TILE_ROWS = 256  # of the kernel, where experts have many
TILE = 2048  # columns of a tile
LANES = 128
LEAST_ROWS = 512  # in a block: with fewer, the matrix units would wait for weights


class Experts(Protocol):
    """What the experts compute of rows sorted by expert; `split` is "ffn" or "expert"."""

    def weights(self, experts: int, split: str, tp: int) -> dict[str, Weight]: ...

    def __call__(
        self,
        w: Mapping[str, jax.Array],
        x_SH: jax.Array,
        ids_S: jax.Array,
        sizes_E: jax.Array,
        first: jax.Array,
    ) -> jax.Array: ...


def grouped(x_SI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows times the matrix of their expert: the first sizes[0] rows times w[0], and so on.

    Summed in float32 and returned in the rows' dtype; rows behind those of all experts are undefined.
    """
    ways = {"default": _grouped_by_xla}
    if x_SI.dtype == w_EIO.dtype == jnp.bfloat16 and x_SI.shape[0] % LANES == 0:
        ways["tpu"] = _grouped_by_kernel
    return jax.lax.platform_dependent(x_SI, w_EIO, sizes_E, **ways)


def _grouped_by_xla(x_SI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    exact, f32 = precision(x_SI, w_EIO), jnp.float32
    y = jax.lax.ragged_dot(x_SI, w_EIO, sizes_E, precision=exact, preferred_element_type=f32)
    return y.astype(x_SI.dtype)


def _grouped_by_kernel(
    x_SI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """The same by jax's kernel, which writes no float32: a third of what a layer would read and write."""
    tiles = tile_rows(x_SI.shape[0], w_EIO.shape[0]), *map(_tile, w_EIO.shape[1:])
    return gmm(x_SI, w_EIO, sizes_E, x_SI.dtype, tiles, interpret=interpret)


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile of the kernel. A tile with rows of two experts is computed for both: small ones waste
    less of that, large ones wait less for weights."""
    return math.gcd(rows, TILE_ROWS if rows >= 4 * TILE_ROWS * experts else LANES)


def _tile(size: int) -> int:
    """The most of a matrix's dimension that is held in fast memory at once."""
    parts = -(-size // TILE)
    return -(-size // (parts * LANES)) * LANES


@dataclass(frozen=True)
class GatedExperts:
    """down(act(gate(x)) * up(x)), each matrix of each expert a tensor of its own in the checkpoint."""

    hidden: int
    ffn: int
    activation: str = "silu"

    def weights(self, experts: int, split: str, tp: int) -> dict[str, Weight]:
        H, F = self.hidden, self.ffn
        column = "ffn" if split == "ffn" else None
        whole = "expert" if split == "expert" else None
        must_divide(tp, F if column else experts, "columns of an expert" if column else "experts")

        def stack(name: str, shape: tuple[int, int], axes: tuple[str | None, str | None]) -> Weight:
            source = f"layers.{{layer}}.{EXPERTS}.{{expert}}.{name}.weight"
            return Weight(source, shape, axes, experts, whole, linear=True, transposed=True)

        return {
            "experts.gate_proj": stack("gate_proj", (F, H), (column, None)),
            "experts.up_proj": stack("up_proj", (F, H), (column, None)),
            "experts.down_proj": stack("down_proj", (H, F), (None, column)),
        }

    def __call__(self, w, x_SH, ids_S, sizes_E):
        gate = grouped(x_SH, w["experts.gate_proj"], sizes_E)
        up = grouped(x_SH, w["experts.up_proj"], sizes_E)
        mixed = ACTIVATIONS[self.activation](gate) * up
        return grouped(mixed, w["experts.down_proj"], sizes_E)


@dataclass(frozen=True)
class ClampedExperts:
    """down((up + 1) * gate * sigmoid(alpha * gate)), gate and up clamped and interleaved, with biases.

    The experts of a layer are one tensor, [E, in, out]. Behaviour: transformers `models/gpt_oss`.
    """

    hidden: int
    ffn: int
    alpha: float
    limit: float

    def weights(self, experts: int, split: str, tp: int) -> dict[str, Weight]:
        H, F, E = self.hidden, self.ffn, experts
        if split != "expert":
            raise EyasError("the experts of this target have biases and are split whole; use split='expert'")
        must_divide(tp, E, "experts")

        def whole(name: str, shape: tuple[int, ...], linear: bool) -> Weight:
            axes = ("expert", *(None,) * (len(shape) - 1))
            return Weight(f"layers.{{layer}}.{EXPERTS}.{name}", shape, axes, linear=linear)

        return {
            "experts.gate_up_proj": whole("gate_up_proj", (E, H, 2 * F), True),
            "experts.gate_up_proj.bias": whole("gate_up_proj_bias", (E, 2 * F), False),
            "experts.down_proj": whole("down_proj", (E, F, H), True),
            "experts.down_proj.bias": whole("down_proj_bias", (E, H), False),
        }

    def __call__(self, w, x_SH, ids_S, sizes_E):
        gate_up = self._biased(w, "experts.gate_up_proj", x_SH, ids_S, sizes_E)
        gate = jnp.minimum(gate_up[:, ::2], self.limit)
        up = jnp.clip(gate_up[:, 1::2], -self.limit, self.limit)
        mixed = ((up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)).astype(x_SH.dtype)
        return self._biased(w, "experts.down_proj", mixed, ids_S, sizes_E).astype(x_SH.dtype)

    def _biased(self, w, name: str, x: jax.Array, ids_S: jax.Array, sizes_E: jax.Array) -> jax.Array:
        bias_EO = w[f"{name}.bias"].astype(jnp.float32)
        y_SO = grouped(x, w[name], sizes_E).astype(jnp.float32)
        return y_SO + bias_EO.at[ids_S].get(mode="clip")


@dataclass(frozen=True)
class Moe:
    """The experts that the router chooses, and an expert that every token goes to."""

    router: Router
    experts: Experts
    shared: Dense | None = None
    shared_gate: bool = False  # the shared expert is weighted by a sigmoid of its own
    split: str = "ffn"

    def weights(self, tp: int) -> dict[str, Weight]:
        declared = self.router.weights() | self.experts.weights(self.router.experts, self.split, tp)
        if self.shared:
            declared |= self.shared.weights(tp)
        if self.shared_gate:
            name = f"layers.{{layer}}.{self.shared.module}_gate.weight"
            declared["shared_gate"] = Weight(name, (1, self.router.hidden), (None, None))
        return declared

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        x_MH = x_BTH.reshape(-1, x_BTH.shape[-1])
        y_BTH = self._routed(w, x_MH, *self._choice(w, x_MH, context), context, x_BTH.shape[:2])
        if self.shared:
            shared = self.shared.partial(w, x_BTH)
            if self.shared_gate:
                shared = shared * jax.nn.sigmoid(linear(x_BTH, w["shared_gate"]))
            y_BTH = y_BTH + shared
        return context.total(y_BTH)

    def _choice(self, w, x_MH, context: Context) -> tuple[jax.Array, jax.Array]:
        """(ids, weights) [M, k]; chips that hold the same tokens route a part of them each."""
        M = x_MH.shape[0]
        if not context.splits(M):
            return self.router(w, x_MH)
        own = jax.lax.dynamic_slice_in_dim(x_MH, context.chip() * (M // context.tp), M // context.tp)
        ids, weights = self.router(w, own)
        return context.gather(ids), context.gather(weights)

    def _routed(self, w, x_MH, ids_Mk, weights_Mk, context: Context, shape: tuple[int, ...]) -> jax.Array:
        """This chip's share of the chosen experts' weighted sum, [*shape, H].

        Tokens are computed in parts, so that the sorted rows of one part are at most SORTED_VALUES values. A
        part's results take the place of its tokens: nothing is filled with zeros or copied for them.
        """
        M, H = x_MH.shape
        parts = -(-M * self.router.top_k * H // SORTED_VALUES)
        if parts == 1:
            return self._part(w, x_MH, ids_Mk, weights_Mk, context, shape)
        size = -(-M // parts)

        def filled(x: jax.Array, fill: int) -> jax.Array:
            return jnp.pad(x, ((0, parts * size - M), (0, 0)), constant_values=fill)

        nobody = self.router.experts  # a number that no expert has: rows that only fill the part go nowhere
        ids_Mk, weights_Mk = filled(ids_Mk, nobody), filled(weights_Mk, 0)

        def part(i: jax.Array, x_MH: jax.Array) -> jax.Array:
            own = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (x_MH, ids_Mk, weights_Mk))
            y = self._part(w, *own, context, (size,))
            return jax.lax.dynamic_update_slice_in_dim(x_MH, y, i * size, 0)

        y_MH = jax.lax.fori_loop(0, parts, part, filled(x_MH, 0))
        return y_MH[:M].reshape(*shape, H)

    def _part(self, w, x_MH, ids_Mk, weights_Mk, context: Context, shape: tuple[int, ...]) -> jax.Array:
        """The weighted sum for one part: rows sorted by expert, multiplied, put back in order and summed."""
        held, first, spread = self.router.experts, jnp.int32(0), 1
        if context.tp and self.split == "expert":
            held, spread = held // context.tp, context.tp
            first = context.chip() * held
        # Experts of other chips get the number `held`, so that their rows are sorted behind all of ours.
        ours_Mk = (ids_Mk >= first) & (ids_Mk < first + held)
        # Slot after slot, each with all tokens: the other way round a TPU would take single numbers out of
        # registers and put them together again, for which its compiler needs minutes.
        local_S = jnp.where(ours_Mk, ids_Mk - first, held).T.reshape(-1)
        order_S = jnp.argsort(local_S, stable=True)
        sorted_S = local_S[order_S]
        stops_E = jnp.searchsorted(sorted_S, jnp.arange(held), side="right").astype(jnp.int32)
        y_SH = self._sorted(w, x_MH, order_S, sorted_S, jnp.diff(stops_E, prepend=0), spread)
        back_kM = jnp.argsort(order_S).reshape(self.router.top_k, -1)
        # Slot by slot, in the shape of what they are added to: XLA for TPU then adds all of them in one go.
        # Without the barrier it would make them float32 first, where they lie.
        slots = range(self.router.top_k)
        found = jax.lax.optimization_barrier([y_SH[back_kM[i]].reshape(*shape, -1) for i in slots])
        if spread > 1:
            ours = ours_Mk.reshape(*shape, -1)
            found = [jnp.where(ours[..., i, None], y, jnp.zeros((), y.dtype)) for i, y in enumerate(found)]
        weights = weights_Mk.reshape(*shape, -1)
        weighted = (y.astype(jnp.float32) * weights[..., i, None] for i, y in enumerate(found))
        return sum(weighted).astype(x_MH.dtype)

    def _sorted(self, w, x_MH, order_S, sorted_S, sizes_E, spread: int) -> jax.Array:
        """The experts' results [S or more, H] of sorted rows; rows behind those of our experts are undefined.

        With `spread` > 1 about one row in `spread` is ours. Blocks of rows are then computed until all of
        ours are done: any number of rows may be ours, and the time taken follows that number.
        """
        M = x_MH.shape[0]
        if spread == 1:
            return self.experts(w, x_MH[order_S % M], sorted_S, sizes_E)
        size = max(LEAST_ROWS, -(-order_S.shape[0] // (spread * BLOCKS)))
        behind = (0, -order_S.shape[0] % size)
        order_S = jnp.pad(order_S, behind)
        sorted_S = jnp.pad(sorted_S, behind, constant_values=sizes_E.shape[0])
        stops_E = jnp.cumsum(sizes_E)

        def block(i: jax.Array, y_SH: jax.Array) -> jax.Array:
            low = i * size
            inside_E = jnp.clip(stops_E - low, 0, size) - jnp.clip(stops_E - sizes_E - low, 0, size)
            rows, ids = (jax.lax.dynamic_slice_in_dim(a, low, size) for a in (order_S, sorted_S))
            y = self.experts(w, x_MH[rows % M], ids, inside_E)
            return jax.lax.dynamic_update_slice_in_dim(y_SH, y, low, 0)

        empty = jnp.zeros_like(sorted_S, x_MH.dtype, shape=(sorted_S.shape[0], x_MH.shape[1]))
        return jax.lax.fori_loop(0, -(-stops_E[-1] // size), block, empty)


def has_experts(cfg: TargetConfig) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(isinstance(layer.feed_forward, Moe) for layer in cfg.layers)


def split_experts(cfg: TargetConfig, split: str) -> TargetConfig:
    """The target with its experts divided over the chips by "ffn" (their columns) or "expert" (whole)."""
    if split not in ("ffn", "expert"):
        raise EyasError(f"experts={split!r} must be 'ffn' or 'expert'")

    def changed(part):
        return replace(part, split=split) if isinstance(part, Moe) else part

    return replace(cfg, layers=tuple(replace(la, feed_forward=changed(la.feed_forward)) for la in cfg.layers))
