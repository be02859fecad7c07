"""A training run that was checked and has not begun.

Dimensions: V draft vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common.params import shapes
from common.store import Store
from train import optimizer, placing
from train.batch import Params
from train.config import TrainConfig
from train.heads.head import Head
from train.init import start
from train.order import Order
from train.sample import Sample
from train.source import Source
from train.stream import View
from train.warm_start import Published


@dataclass(frozen=True)
class Plan:
    """A checked run that has not begun. `order` names the rows of every step; `counted` is how many positions
    an epoch counts; `identity` is what two runs must share for one to continue the other."""

    config: TrainConfig
    source: Source
    head: Head
    draft_ids: np.ndarray
    dtype: Any
    order: Order
    view: View
    counted: int
    eval_every: int
    eval_rows: int  # of the test split
    save_every: int | None  # None: as the cost allows
    published: Published | None
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        return len(self.order.rows)

    @property
    def store(self) -> Store:
        return self.source.store

    @property
    def mesh(self) -> Mesh:
        return self.source.mesh

    @property
    def seed(self) -> np.uint32:
        """The seed of the head and of noise, as programs take it."""
        return np.uint32(self.config.seed)

    def shapes(self) -> Params:
        """ShapeDtypeStructs of the head's float32 parameters, as they lie on the mesh."""
        return shapes(placing.layout(self.head.parameters(), self.mesh), jnp.float32, self.mesh)

    def sample(self) -> Sample:
        """What the head is told of its target before it trains."""
        c = self.config
        how = self.head.inputs, self.head.rms_eps, c.init == "fitted", self.dtype
        return self.source.sample(self.view.workload, c.data_seed, c.share, *how)

    def initial(self, sample: Sample) -> Params:
        """The untrained head, or the published one, as it lies on the mesh."""
        c = self.config
        if self.published:
            found = self.published.weights()
            where = placing.along(found, self.head.parameters(), self.mesh)
            return jax.tree.map(placing.place, found, where)
        knows = c.init != "normal" or self.head.still()
        rows = self.source.rows_of(self.head.rows_of, self.draft_ids, self.dtype) if knows else None
        return start(self.head, self.mesh, sample, rows, c.init, self.seed)

    def optimizer(self, rate: optax.Schedule, sample: Sample) -> optax.GradientTransformation:
        """What trains the head, with the head's matrices in its units."""
        c = self.config
        units = self.head.units(sample)
        muon = self.head.matrices() if c.optimizer == "muon" else frozenset()
        still = self.head.still()
        return optimizer.make(rate, c.clip, c.betas, c.weight_decay, units, muon=muon, still=still, ema=c.ema)


def room(config: TrainConfig, head: Head) -> int:
    """The bytes that a run needs: float32 parameters, their average, and moments of those that are trained,
    three times (two kept, one written), two exports."""
    sizes = {name: math.prod(p.shape) for name, p in head.parameters().items()}
    count, trained = sum(sizes.values()), sum(sizes[name] for name in sizes.keys() - head.still())
    return 3 * ((8 if config.ema else 4) * count + 8 * trained) + 2 * 2 * count + (1 << 20)
