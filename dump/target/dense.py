"""Matmuls of the target, and the dense feed-forward part."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.errors import EyasError
from common.layers import linear
from dump.target.spec import Context, Weight

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def project(w: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """x times the matrix `name` (split by its outputs, or whole), plus its bias if it has one."""
    y = linear(x, w[name])
    return y + _bias(w, name, y) if f"{name}.bias" in w else y


def project_back(w: Mapping[str, jax.Array], name: str, x: jax.Array, context: Context) -> jax.Array:
    """x times the matrix `name`, split by its inputs: summed over the chips, the bias added once."""
    y = context.total(linear(x, w[name]))
    return y + _bias(w, name, y) if f"{name}.bias" in w else y


def _bias(w: Mapping[str, jax.Array], name: str, y: jax.Array) -> jax.Array:
    return jnp.expand_dims(w[f"{name}.bias"].astype(y.dtype), range(y.ndim - 1))


def matrix(name: str, out: int, into: int, axes: tuple[str | None, str | None], bias: bool = False) -> dict:
    """Declares the matrix [out, into] (and bias) of `NAME.weight`, NAME relative to the layer."""
    local = name.rsplit(".", 1)[-1]
    declared = {local: Weight(f"layers.{{layer}}.{name}.weight", (out, into), axes)}
    if bias:
        declared[f"{local}.bias"] = Weight(f"layers.{{layer}}.{name}.bias", (out,), axes[:1])
    return declared


def vector(name: str, size: int, axis: str | None = None) -> dict[str, Weight]:
    """Declares the vector of `NAME.weight`."""
    return {name.rsplit(".", 1)[-1]: Weight(f"layers.{{layer}}.{name}.weight", (size,), (axis,))}


def must_divide(tp: int, size: int, what: str) -> None:
    """EyasError if `tp` chips cannot share `size` of `what` evenly."""
    if size % tp:
        raise EyasError(f"tp={tp} does not divide the target's {size} {what}; choose another tp")


@dataclass(frozen=True)
class Dense:
    """down(act(gate(x)) * up(x))."""

    hidden: int
    ffn: int
    activation: str = "silu"
    bias: bool = False

    def weights(self, tp: int) -> dict[str, Weight]:
        must_divide(tp, self.ffn, "feed-forward columns")
        H, F, bias = self.hidden, self.ffn, self.bias
        return (
            matrix("mlp.gate_proj", F, H, ("ffn", None), bias)
            | matrix("mlp.up_proj", F, H, ("ffn", None), bias)
            | matrix("mlp.down_proj", H, F, (None, "ffn"), bias)
        )

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        return project_back(
            w, "down_proj", act(project(w, "gate_proj", x_BTH)) * project(w, "up_proj", x_BTH), context
        )
