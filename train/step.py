"""The jitted steps: rows lie over every chip, each chip computes its own, and the sums cross the mesh.

Dimensions: K TTT steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from common.mesh import spec
from train import placing
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


def _over_mesh(
    head: Head, mesh: Mesh, dtype: Any, fn: Callable, gradients: bool
) -> Callable[[Params, Frozen, Batch], Any]:
    """`fn(params, frozen, batch)` on every chip's own rows; the result is summed up and the same on all.

    With `gradients` also those of the first result, which lie as the parameters do: (results, gradients).
    `fn` gets whole parameters, the matrices in `dtype`.
    """
    declared = placing.layout(head.parameters(), mesh)

    def over_mesh(params: Params, frozen: Frozen, batch: Batch) -> Any:
        axes = placing.frozen_axes(frozen, mesh)

        def on_shard(params: Params, frozen: Frozen, batch: Batch) -> Any:
            def on_rows(params: Params) -> Any:
                return fn(*placing.gathered(params, frozen, declared, axes, dtype), batch)

            if not gradients:
                return _summed(on_rows(params))
            found, by_params = jax.value_and_grad(on_rows, has_aux=True)(params)
            return _summed(found), by_params

        in_specs = (*placing.in_specs(head.parameters(), frozen, mesh), _ROW)
        out_specs = (_ALL, in_specs[0]) if gradients else _ALL
        over_chips = jax.shard_map(
            on_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        where = jax.tree.map(lambda of: NamedSharding(mesh, of), in_specs)
        return over_chips(*jax.sharding.reshard((params, frozen, batch), where))

    return over_mesh


def _summed(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.psum(x, _ROW[0]), tree)


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

    def loss(params: Params, frozen: Frozen, batch: Batch) -> Any:
        counts_K = jax.lax.psum(shard_counts(frozen, batch, steps), _ROW[0])
        by_K = jnp.maximum(counts_K, 1.0)
        if compat == "specforge":
            by_K = jnp.full((steps,), float(batch.tokens.size * mesh.size))
        total, sums = shard_loss(head, loss_of, params, frozen, batch, decays_K / by_K, dtype)
        return total, (sums.loss / by_K, sums.correct / jnp.maximum(counts_K, 1.0))

    over_mesh = _over_mesh(head, mesh, dtype, loss, gradients=True)

    def gradient_of(params: Params, frozen: Frozen, batch: Batch) -> Any:
        (total, (loss_K, acc_K)), gradients = over_mesh(params, frozen, batch)
        return (total, loss_K, acc_K), gradients

    return gradient_of


def train_step(
    gradients_of: Callable, optimizer: optax.GradientTransformation
) -> Callable[[State, Frozen, Batch], tuple[State, Metrics]]:
    """One optimiser step; to be jitted with the state donated."""
    with_loss = optax.with_extra_args_support(optimizer)

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Metrics]:
        (loss, loss_K, acc_K), gradients = gradients_of(state.params, frozen, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it; our own code runs under "strict"
            params, moments, norm = _updated(with_loss, state, gradients, loss)
        metrics = Metrics(loss, loss_K, acc_K, norm, *skipped(moments))
        return State(params, moments, state.step + 1), metrics

    return step


def _updated(
    optimizer: optax.GradientTransformationExtraArgs, state: State, gradients: Params, loss: jax.Array
) -> tuple:
    """(parameters, moments, norm of the gradients). The compiler decides where they lie meanwhile, so that
    any optimiser can be used as it comes; they end where they lay."""

    def update(state: State, gradients: Params, loss: jax.Array) -> tuple:
        updates, moments = optimizer.update(gradients, state.optimizer, state.params, loss=loss)
        norm = gradient_norm(moments, optax.tree.norm(gradients))
        return optax.apply_updates(state.params, updates), moments, norm

    mesh = jax.typeof(jax.tree.leaves(state.params)[0]).sharding.mesh

    def lies(x: jax.Array) -> NamedSharding:
        found = jax.typeof(x).sharding
        return NamedSharding(mesh, _ALL) if found.mesh.empty else found

    if mesh.empty:
        return update(state, gradients, loss)
    where = *jax.tree.map(lies, (state.params, state.optimizer)), NamedSharding(mesh, _ALL)
    return jax.sharding.auto_axes(update, out_sharding=where)(state, gradients, loss)


def score_step(
    head: Head, mesh: Mesh, steps: int, dtype: Any, answer_tokens: int | None = None
) -> Callable[[Params, Frozen, Batch], Sums]:
    """A function that gives the sums behind the metrics of a batch."""

    def on_rows(params: Params, frozen: Frozen, batch: Batch) -> Sums:
        scores, valid_MK, known_M = shard_scores(head, params, frozen, batch, steps, dtype)
        return shard_sums(scores, valid_MK, known_M, batch, answer_tokens)

    return _over_mesh(head, mesh, dtype, on_rows, gradients=False)
