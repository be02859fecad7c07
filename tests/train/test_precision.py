"""float32 is float32 on every machine: no matmul of a step leaves it to the accelerator."""

import jax
import jax.numpy as jnp
import pytest

from common.mesh import make_mesh
from tests.matmuls import imprecise, matmuls
from tests.train.on_device import STEPS, on_mesh
from tests.train.problem import head_config, problem
from train import optimizer
from train.step import State, gradient, score_step, train_step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_matmul_of_training_and_scoring_is_of_full_precision(dtype):
    p, c, mesh = problem(), head_config(), make_mesh()
    adamw = optimizer.make(optimizer.schedule(1e-3, 0.1, 10), 0.5, (0.9, 0.99), 0.0)
    params, frozen, batch = on_mesh(p, mesh)
    state = State(params, adamw.init(params), jnp.int32(0))
    frozen = frozen._replace(embed=frozen.embed.astype(dtype), lm_head=frozen.lm_head.astype(dtype))
    step = train_step(gradient(c, mesh, STEPS, 0.8, dtype), adamw)
    for fn, first in ((step, state), (score_step(c, mesh, STEPS, dtype), params)):
        found = matmuls(jax.jit(fn), first, frozen, batch)
        assert len(found) > 12
        assert not imprecise(found)
