"""The jitted steps: rows lie over the chips, each chip computes its own, and the sums cross the mesh.

Dimensions: K TTT steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from common.mesh import spec
from train import pieces, placing
from train.batch import Batch, Frozen, Params, in_parts
from train.heads.head import Head
from train.losses import Loss, cross_entropy
from train.metrics import Sums, shard_sums
from train.objective import shard_counts, shard_loss, shard_scores
from train.optimizer import gradient_norm, skipped

_ALL = spec(())


class State(NamedTuple):
    """What training changes. `step` is the number of steps done, int32 []; `seed`, which stays, is data as
    the units and rates of the optimiser are: one program serves all seeds."""

    params: Params
    optimizer: Any
    step: jax.Array
    seed: Any = np.uint32(0)


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
    head: Head, mesh: Mesh, steps: int, dtype: Any, fn: Callable, context: Callable | None = None
) -> Callable[[Params, Frozen, Batch], Any]:
    """`fn(params, frozen, batch)` on every chip's own rows, or pieces of them with what a rollout of so many
    steps sees ahead; the result is summed up and the same on all.

    `fn` gets whole parameters, the matrices in `dtype`. With a `context(frozen, batch)`, which it gets too,
    also the gradients of its first result, which lie as the parameters do: (results, gradients).
    """
    declared = placing.layout(head.parameters(), mesh)

    def over_mesh(params: Params, frozen: Frozen, batch: Batch) -> Any:
        axes = placing.frozen_axes(frozen, mesh)

        def on_shard(params: Params, frozen: Frozen, batch: Batch) -> Any:
            batch = pieces.with_halo(batch, steps)

            def gathered(params: Params) -> tuple[Params, Frozen]:
                return placing.gathered(params, frozen, declared, axes, dtype)

            if context is None:
                return _summed(fn(*gathered(params), batch))
            found, by_params = _gradients(fn, gathered, params, batch, context(frozen, batch))
            return _summed(found), by_params

        in_specs = (*placing.in_specs(head.parameters(), frozen, mesh), placing.batch_specs(batch))
        out_specs = _ALL if context is None else (_ALL, in_specs[0])
        over_chips = jax.shard_map(
            on_shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        where = jax.tree.map(lambda of: NamedSharding(mesh, of), in_specs)
        return over_chips(*jax.sharding.reshard((params, frozen, batch), where))

    return over_mesh


def _gradients(
    fn: Callable, gathered: Callable, params: Params, batch: Batch, given: Any
) -> tuple[Any, Params]:
    """(what `fn` gives, the gradients of the first of it) of a chip's rows. Where they are in several parts,
    one after the other: so the memory of one is enough."""
    if len(batch.count) == 1:
        return jax.value_and_grad(lambda x: fn(*gathered(x), batch, given), has_aux=True)(params)
    whole, pullback, frozen = jax.vjp(gathered, params, has_aux=True)

    def of_part(part: Batch) -> tuple[Any, Params]:
        return jax.value_and_grad(lambda x: fn(x, frozen, part, given), has_aux=True)(whole)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), total, of_part(part)), None

    parts = in_parts(batch)
    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (found, by_whole), _ = jax.lax.scan(add, zeros, parts)
    return found, pullback(jax.tree.map(lambda x, w: x.astype(w.dtype), by_whole, whole))[0]


def _summed(tree: Any) -> Any:
    return jax.tree.map(placing.summed, tree)


def gradient(
    head: Head,
    mesh: Mesh,
    steps: int,
    decay: float,
    dtype: Any,
    compat: str | None = None,
    loss_of: Loss = cross_entropy,
    shares: tuple[float, ...] = (),
) -> Callable[[Params, Frozen, Batch], tuple[jax.Array, Metrics, Params]]:
    """A function that gives (loss, L_k [K], acc_k [K]), gradients of a batch.

    The loss is sum_k decay^k L_k, L_k the mean of `loss_of` over the batch's counted positions of step k;
    `compat="specforge"` divides by all B * T positions instead, counted or not. Step k has a share
    `shares[k]` of the targets (train/anchors.py), all by default, and is divided by so many fewer.
    """
    decays_K = decay ** jnp.arange(steps, dtype=jnp.float32)
    shares_K = np.array(shares or [1] * steps, np.float32)

    def divisors(frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """By what the loss and the counts of right ones are divided [K], over all parts of all chips."""
        own_K = jax.lax.map(lambda part: shard_counts(frozen, part, steps), in_parts(batch)).sum(0)
        counts_K = jnp.maximum(placing.summed(own_K), 1.0) * shares_K
        if compat == "specforge":
            rows, positions = batch.aux_hidden.shape[:2]
            return float(rows * positions * mesh.size) * shares_K, counts_K
        return counts_K, counts_K

    def loss(params: Params, frozen: Frozen, batch: Batch, by: tuple[jax.Array, jax.Array]) -> Any:
        total, sums = shard_loss(head, loss_of, params, frozen, batch, decays_K / by[0], dtype)
        return total, (sums.loss / by[0], sums.correct / by[1])

    over_mesh = _over_mesh(head, mesh, steps, dtype, loss, divisors)

    def gradient_of(params: Params, frozen: Frozen, batch: Batch) -> Any:
        (total, (loss_K, acc_K)), gradients = over_mesh(params, frozen, batch)
        return (total, loss_K, acc_K), gradients

    return gradient_of


def train_step(
    gradients_of: Callable,
    optimizer: optax.GradientTransformation,
    changed: Callable[[Batch, State], Batch] = lambda batch, state: batch,
) -> Callable[[State, Frozen, Batch], tuple[State, Metrics]]:
    """One optimiser step; to be jitted with the state donated. `changed` gives what of a batch is trained on
    in a state."""
    with_loss = optax.with_extra_args_support(optimizer)

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Metrics]:
        (loss, loss_K, acc_K), gradients = gradients_of(state.params, frozen, changed(batch, state))
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it; our own code runs under "strict"
            params, moments, norm = _updated(with_loss, state, gradients, loss)
        metrics = Metrics(loss, loss_K, acc_K, norm, *skipped(moments))
        return State(params, moments, state.step + 1, state.seed), metrics

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

    return _over_mesh(head, mesh, steps, dtype, on_rows)
