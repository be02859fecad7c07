"""A problem of `problem.py` as the arrays that the trainer takes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.mesh import sharding
from tests.train.problem import Problem
from train.batch import Batch, Frozen
from train.targets import compact, counted_targets, live_queries, round_up

STEPS = 3


def f32(x):
    return jnp.asarray(x, jnp.float32)


def parameters_of(p: Problem) -> dict:
    return {name: f32(array) for name, array in p.params.items()}


def frozen_of(p: Problem) -> Frozen:
    index = np.full(p.config.vocab_size, -1, np.int32)
    index[p.draft_ids] = np.arange(len(p.draft_ids))
    return Frozen(f32(p.embed), f32(p.target_head[p.draft_ids]), jnp.asarray(index))


def batch_of(p: Problem, compat=None, shards=1, taught=None) -> Batch:
    """The problem's rows with their plan; `taught` [B, T] restricts the targets, not the live queries."""
    counted = counted_targets(p.segments, p.mask, compat)
    live = live_queries(p.segments, counted, STEPS)
    targets = counted if taught is None else counted & taught
    size = round_up(p.tokens.size)
    logits = p.target_logits
    return Batch(
        tokens=jnp.asarray(p.tokens),
        segment_ids=jnp.asarray(p.segments),
        positions=jnp.asarray(p.positions),
        aux_hidden=f32(p.aux),
        last_hidden=f32(p.last),
        draft_logprobs=None,
        argmax=jnp.asarray(logits.argmax(-1), jnp.int32),
        logsumexp=f32(np.log(np.exp(logits).sum(-1))),
        live=jnp.asarray(compact(live, shards, size)),
        targets=jnp.asarray(compact(targets, shards, size)),
        count=jnp.asarray(targets.reshape(shards, -1).sum(1), jnp.int32),
    )


def on_mesh(p: Problem, mesh: Mesh, compat=None, parts=1) -> tuple[dict, Frozen, Batch]:
    """(parameters, frozen, batch) where a jitted step has them."""
    everywhere = jax.device_put((parameters_of(p), frozen_of(p)), sharding(mesh, ()))
    rows = jax.tree.map(
        lambda x: jax.device_put(x, sharding(mesh, ("row",) + (None,) * (x.ndim - 1))),
        batch_of(p, compat, shards=mesh.size * parts),
    )
    return *everywhere, rows
