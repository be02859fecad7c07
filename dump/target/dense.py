"""Matmuls of the target, and the dense feed-forward part.

Weights are split over the chips by their outputs (then nothing is summed) or by their inputs (then the
results are partial sums, and `context.total` makes them whole).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.errors import EyasError
from common.layers import einsum, linear
from dump.target.spec import Context, Weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def project(w: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """x times the matrix `name`, plus its bias if it has one."""
    return add_bias(w, name, linear(x, w[name]))


def merged(heads_BTND: jax.Array, w_OM: jax.Array) -> jax.Array:
    """The heads' results times the matrix [O, N * D] that follows them, without bringing them together."""
    N, D = heads_BTND.shape[2:]
    heads_BNTD, w_OND = heads_BTND.swapaxes(1, 2), w_OM.reshape(-1, N, D)
    return einsum("bntd,ond->bto", heads_BNTD, w_OND).astype(heads_BTND.dtype)


def add_bias(w: Mapping[str, jax.Array], name: str, y: jax.Array) -> jax.Array:
    """y plus the bias of `name`, if it has one."""
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - 1))


def matrix(name: str, out: int, into: int, axes: tuple[str | None, str | None], bias: bool = False) -> dict:
    """Declares the matrix [out, into] (and bias) of `NAME.weight`, NAME relative to the layer."""
    local = local_name(name)
    declared = {local: Weight(f"layers.{{layer}}.{name}.weight", (out, into), axes, linear=True)}
    if bias:
        declared[f"{local}.bias"] = Weight(f"layers.{{layer}}.{name}.bias", (out,), axes[:1])
    return declared


def vector(name: str, size: int, axis: str | None = None) -> dict[str, Weight]:
    """Declares the vector of `NAME.weight`."""
    return {local_name(name): Weight(f"layers.{{layer}}.{name}.weight", (size,), (axis,))}


def local_name(name: str) -> str:
    """A part's own name of a weight: without the module that holds it."""
    return name.split(".", 1)[-1]


def must_divide(tp: int, size: int, what: str) -> None:
    """EyasError if `tp` chips cannot share `size` of `what` evenly."""
    if size % tp:
        raise EyasError(f"tp={tp} does not divide the target's {size} {what}; choose another tp")


@dataclass(frozen=True)
class Dense:
    """down(act(gate(x)) * up(x)); `module` is its place in the layer."""

    hidden: int
    ffn: int
    activation: str = "silu"
    bias: bool = False
    module: str = "mlp"

    def weights(self, tp: int) -> dict[str, Weight]:
        must_divide(tp, self.ffn, "feed-forward columns")
        H, F, bias = self.hidden, self.ffn, self.bias
        return (
            matrix(f"{self.module}.gate_proj", F, H, ("ffn", None), bias)
            | matrix(f"{self.module}.up_proj", F, H, ("ffn", None), bias)
            | matrix(f"{self.module}.down_proj", H, F, (None, "ffn"), bias)
        )

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        return add_bias(w, self._local("down_proj"), context.total(self.partial(w, x_BTH)))

    def partial(self, w: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """This chip's share of the result, without the last bias."""
        gate, up = project(w, self._local("gate_proj"), x), project(w, self._local("up_proj"), x)
        return linear(ACTIVATIONS[self.activation](gate) * up, w[self._local("down_proj")])

    def _local(self, name: str) -> str:
        return local_name(f"{self.module}.{name}")
