"""The jitted steps: rows lie over every chip, each chip computes its own, and the sums cross the mesh.

Dimensions: K TTT steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from common.mesh import spec
from train.batch import Batch, Frozen, Params
from train.heads import Head
from train.losses import Loss, cross_entropy
from train.metrics import Sums, shard_sums
from train.objective import shard_counts, shard_loss, shard_scores
from train.optimizer import gradient_norm, skipped

_ROW = spec(("row",))
_ALL = spec(())


class State(NamedTuple):
    """What training changes. `step` is the number of steps done, int32 []."""

    params: Params
    optimizer: Any
    step: jax.Array


class Metrics(NamedTuple):
    """Of one step: loss is the sum that is minimised; by TTT step [K] the loss, and the share that is right
    of the targets in the draft vocabulary; the norm of all gradients, as clipping sees it; how many steps
    were skipped so far, because loss or norm were not finite, and how many of the last ones in a row."""

    loss: jax.Array
    loss_K: jax.Array
    acc_K: jax.Array
    gradient_norm: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def _over_mesh(mesh: Mesh, fn: Callable) -> Callable:
    """`fn(params, frozen, batch)` on every chip's own rows; the result is summed up and the same on all."""

    def on_shard(*args: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.psum(x, _ROW[0]), fn(*args))

    return jax.shard_map(on_shard, mesh=mesh, in_specs=(_ALL, _ALL, _ROW), out_specs=_ALL, check_vma=False)


def gradient(
    head: Head,
    mesh: Mesh,
    steps: int,
    decay: float,
    dtype: Any,
    compat: str | None = None,
    loss_of: Loss = cross_entropy,
) -> Callable[[Params, Frozen, Batch], tuple[jax.Array, Metrics, Params]]:
    """A function that gives (loss, L_k [K], acc_k [K]), gradients of a batch.

    The loss is sum_k decay^k L_k, L_k the mean of `loss_of` over the batch's counted positions of step k;
    `compat="specforge"` divides by all B * T positions instead, counted or not.
    """
    decays_K = decay ** jnp.arange(steps, dtype=jnp.float32)

    def on_rows(params: Params, frozen: Frozen, batch: Batch) -> Any:
        counts_K = jax.lax.psum(shard_counts(frozen, batch, steps), _ROW[0])
        by_K = jnp.maximum(counts_K, 1.0)
        if compat == "specforge":
            by_K = jnp.full((steps,), float(batch.tokens.size * mesh.size))
        weight_K = decays_K / by_K

        def loss(params: Params) -> Any:
            return shard_loss(head, loss_of, params, frozen, batch, weight_K, dtype)

        (total, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return (total, sums.loss / by_K, sums.correct / jnp.maximum(counts_K, 1.0)), gradients

    return _over_mesh(mesh, on_rows)


def train_step(
    gradients_of: Callable, optimizer: optax.GradientTransformation
) -> Callable[[State, Frozen, Batch], tuple[State, Metrics]]:
    """One optimiser step; to be jitted with the state donated."""
    with_loss = optax.with_extra_args_support(optimizer)

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Metrics]:
        (loss, loss_K, acc_K), gradients = gradients_of(state.params, frozen, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it; our own code runs under "strict"
            updates, moments = with_loss.update(gradients, state.optimizer, state.params, loss=loss)
            params = optax.apply_updates(state.params, updates)
            norm = gradient_norm(moments, optax.tree.norm(gradients))
        metrics = Metrics(loss, loss_K, acc_K, norm, *skipped(moments))
        return State(params, moments, state.step + 1), metrics

    return step


def score_step(
    head: Head, mesh: Mesh, steps: int, dtype: Any, answer_tokens: int | None = None
) -> Callable[[Params, Frozen, Batch], Sums]:
    """A function that gives the sums behind the metrics of a batch."""

    def on_rows(params: Params, frozen: Frozen, batch: Batch) -> Sums:
        scores, valid_MK, known_M = shard_scores(head, params, frozen, batch, steps, dtype)
        return shard_sums(scores, valid_MK, known_M, batch, answer_tokens)

    return _over_mesh(mesh, on_rows)
