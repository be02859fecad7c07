"""Mixture of experts at the cost of the active ones: tokens sorted by expert, matmuls in groups.

Shapes are static and no token is dropped: M tokens make M * k rows, whatever the experts they go to.
Experts are split over the chips by their columns ("ffn"), or whole ("expert").

Dimensions: M tokens, k experts a token, S = M * k sorted rows, E experts held by this chip, F their width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp

from common.errors import EyasError
from common.layers import linear
from dump.target.dense import ACTIVATIONS, Dense, must_divide
from dump.target.routing import Router
from dump.target.spec import Context, TargetConfig, Weight

EXPERTS = "mlp.experts"


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
    """Rows times the matrix of their expert: the first sizes[0] rows times w[0], and so on; in x's dtype."""
    precision = jax.lax.Precision.HIGHEST if x_SI.dtype == jnp.float32 else None
    y = jax.lax.ragged_dot(x_SI, w_EIO, sizes_E, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x_SI.dtype)


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
        return grouped(ACTIVATIONS[self.activation](gate) * up, w["experts.down_proj"], sizes_E)


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
        return self._biased(
            w, "experts.down_proj", (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate), ids_S, sizes_E
        )

    def _biased(self, w, name: str, x: jax.Array, ids_S: jax.Array, sizes_E: jax.Array) -> jax.Array:
        bias_EO = w[f"{name}.bias"].astype(x.dtype)
        return grouped(x, w[name], sizes_E) + bias_EO.at[ids_S].get(mode="clip")


@dataclass(frozen=True)
class Moe:
    """The experts that the router chooses, plus an expert that every token shares."""

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
        ids_Mk, weights_Mk = self.router(w, x_MH)
        y_MH = self._routed(w, x_MH, ids_Mk, weights_Mk, context)
        if self.shared:
            shared = self.shared.partial(w, x_MH)
            if self.shared_gate:
                shared = shared * jax.nn.sigmoid(linear(x_MH, w["shared_gate"]))
            y_MH = y_MH + shared
        return context.total(y_MH).reshape(x_BTH.shape)

    def _routed(self, w, x_MH, ids_Mk, weights_Mk, context: Context) -> jax.Array:
        """This chip's share of the chosen experts' weighted sum."""
        k = self.router.top_k
        held = self.router.experts
        first = jnp.int32(0)
        if context.tp and self.split == "expert":
            held //= context.tp
            first = context.chip() * held
        # Experts of other chips get the number `held`: their rows come behind ours and belong to no group.
        local_S = jnp.where((ids_Mk >= first) & (ids_Mk < first + held), ids_Mk - first, held).reshape(-1)
        order_S = jnp.argsort(local_S, stable=True)
        sorted_S = local_S[order_S]
        sizes_E = (local_S[:, None] == jnp.arange(held)[None]).sum(0, dtype=jnp.int32)
        y_SH = self.experts(w, x_MH[order_S // k], sorted_S, sizes_E)
        weighted = y_SH.astype(jnp.float32) * weights_Mk.reshape(-1)[order_S][:, None]
        ours = jnp.where((sorted_S < held)[:, None], weighted, 0.0)
        back_S = jnp.argsort(order_S)
        return ours[back_S].reshape(-1, k, x_MH.shape[-1]).sum(1).astype(x_MH.dtype)


def split_experts(cfg: TargetConfig, split: str) -> TargetConfig:
    """The target with its experts divided over the chips by "ffn" (their columns) or "expert" (whole)."""
    if split not in ("ffn", "expert"):
        raise EyasError(f"experts={split!r} must be 'ffn' or 'expert'")

    def changed(part):
        return replace(part, split=split) if isinstance(part, Moe) else part

    return replace(cfg, layers=tuple(replace(la, feed_forward=changed(la.feed_forward)) for la in cfg.layers))
