"""float32 is float32 on every machine: no matmul of a forward pass leaves it to the accelerator."""

import jax
import jax.numpy as jnp
import pytest

from common import storage
from common.params import shapes
from dump import target
from tests.goldens import golden
from tests.matmuls import imprecise, matmuls


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", golden.names())
def test_every_matmul_of_a_forward_pass_is_of_full_precision(name, dtype, tmp_path):
    made = golden.read(name)
    storage.write_json(f"{tmp_path}/config.json", made.config)
    cfg = target.read_config(str(tmp_path))
    row = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def whole(weights, *rows):
        return target.logits(cfg, weights, target.forward(cfg, weights, *rows, made.aux_layers)[1])

    found = matmuls(whole, shapes(target.parameters(cfg, 1), dtype), row, row, row)
    assert len(found) >= 7
    assert not imprecise(found)
