"""float32 stays float32 on accelerators: every matmul of the forward pass asks for it and sums in it."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from common.params import shapes
from dump import target
from tests.goldens import golden

MATMULS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")


def matmuls(jaxpr: Any) -> Iterator[Any]:
    """Every matmul of a program, inner programs included but for Pallas kernels, which take bfloat16 only."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            continue
        if equation.primitive.name in MATMULS:
            yield equation
        yield from (found for inner in jaxprs_in_params(equation.params) for found in matmuls(inner))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", golden.names())
def test_every_matmul_is_exact_in_float32_and_sums_in_it(name, dtype, tmp_path):
    made = golden.read(name)
    cfg = target.read_config(golden.write_folder(made, tmp_path))

    def whole(weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        aux, last = target.forward(cfg, weights, tokens, jnp.ones_like(tokens), positions, made.aux_layers)
        return aux, target.logits(cfg, weights, last)

    weights = shapes(target.parameters(cfg), dtype)
    found = list(matmuls(jax.make_jaxpr(whole)(weights, jax.ShapeDtypeStruct((1, 70), jnp.int32)).jaxpr))
    assert len(found) > 7
    highest = jax.lax.Precision.HIGHEST
    for equation in found:
        assert equation.outvars[0].aval.dtype == jnp.float32, equation
        if any(x.aval.dtype == jnp.float32 for x in equation.invars[:2]):
            assert equation.params["precision"] in (highest, (highest, highest)), equation
