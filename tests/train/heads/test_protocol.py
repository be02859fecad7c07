"""Nothing outside of a head's own package knows what is in it: a kind that is nothing like EAGLE3 trains."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from common.config import knobs
from common.layers import linear
from common.mesh import make_mesh
from common.params import Param, initialise
from tests.train.on_device import STEPS, on_mesh
from tests.train.problem import problem
from train import optimizer
from train.batch import by_steps
from train.config import TrainConfig
from train.heads import HEADS
from train.metrics import add, summarise
from train.sample import Sample
from train.step import State, gradient, score_step, train_step


@dataclass(frozen=True)
class Linear:
    """A head without attention: each step has a matrix of its own from the aux states to logits."""

    inputs: int
    draft_vocab_size: int
    steps: int

    def parameters(self):
        shapes = {f"steps.{k}": (self.draft_vocab_size, self.inputs) for k in range(self.steps)}
        return {name: Param(shape, (None, None)) for name, shape in shapes.items()}

    def rollout(self, params, frozen, batch, steps, dtype):
        aux = batch.aux_hidden.reshape(batch.tokens.size, -1)

        def states(at_steps, part):
            x = aux.at[part.live].get(mode="fill", fill_value=0).astype(dtype)
            return jnp.stack([linear(x, params[f"steps.{k}"].astype(dtype)) for k in at_steps])

        return [states(*part) for part in by_steps(batch, steps)]

    def output(self, params):
        return jnp.eye(self.draft_vocab_size)

    def units(self, sample):
        return {name: sample.units_A for name in self.parameters()}


def test_another_kind_of_head_learns_and_is_scored():
    p, mesh = problem(), make_mesh()
    c = p.config
    head = Linear(c.hidden_size * len(c.aux_layers), c.draft_vocab_size, STEPS)
    _, frozen, batch = on_mesh(p, mesh)
    params = initialise(head.parameters(), jax.random.key(0))
    units = head.units(Sample(np.full(head.inputs, 2.0, np.float32), None))
    adamw = optimizer.make(optimizer.schedule(0.1, 0.1, 30), 10.0, (0.9, 0.99), 0.0, units)
    step = jax.jit(train_step(gradient(head, mesh, STEPS, 0.8, jnp.float32), adamw))
    state, losses = State(params, adamw.init(params), jnp.int32(0)), []
    for _ in range(30):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    score = jax.jit(score_step(head, mesh, STEPS, jnp.float32))
    before, after = (summarise(add(None, score(x, frozen, batch))) for x in (params, state.params))
    assert np.mean(after["acc"]) > np.mean(before["acc"])


def test_every_kind_of_head_can_be_chosen_with_its_own_options():
    (kinds,) = (knob.setting.choices for knob in knobs(TrainConfig) if knob.name == "kind")
    assert set(kinds) == HEADS.keys()
    known = {knob.name for knob in knobs(TrainConfig)}
    assert all(set(kind.options) <= known for kind in HEADS.values())
