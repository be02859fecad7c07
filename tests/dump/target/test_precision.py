"""float32 stays float32 on accelerators: every matmul of the forward pass asks for it and sums in it."""

import jax
import jax.numpy as jnp
import pytest

from common.params import shapes
from dump import target
from tests.goldens import golden
from tests.matmuls import imprecise, matmuls


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
    found = matmuls(whole, weights, jax.ShapeDtypeStruct((1, 70), jnp.int32))
    assert len(found) > 7
    assert not imprecise(found)
