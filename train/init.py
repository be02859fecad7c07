"""A fresh head, with what the store's sample knows; it is made on the chips, each its part."""

import jax
import numpy as np
from jax.sharding import Mesh

from common.params import initialise
from train import placing
from train.batch import Params
from train.heads.head import Head
from train.sample import Sample

_START = 2**31  # a fold of the key beyond those of parameters


def start(
    head: Head, mesh: Mesh, sample: Sample, lm_head_DH: jax.Array | None, init: str, seed: int | np.uint32
) -> Params:
    """A fresh head in float32: all N(0, 0.02) in units of its features ("normal"), with the target's rows as
    its output ("target"), or also with the sample's fit ("fitted"). The same arguments give the same head. An
    output that is not trained has the target's rows in any case.
    """
    sample = sample if init == "fitted" else sample._replace(fit=None)
    lm_head_DH = None if init == "normal" and not head.still() else lm_head_DH

    def made(sample: Sample, lm_head_DH: jax.Array | None, seed: jax.Array) -> Params:
        key = jax.random.key(seed)
        noise = initialise(head.parameters(), key)
        return head.start(noise, sample, lm_head_DH, jax.random.fold_in(key, _START))

    given = sample, lm_head_DH, np.uint32(seed)
    where = placing.along(jax.eval_shape(made, *given), head.parameters(), mesh)
    return jax.jit(jax.sharding.auto_axes(made, out_sharding=where))(*given)
