"""AdamW or Muon over float32 masters: clipped, on a schedule, with an average of the weights, and guarded.

Everything is a transformation of optax; states are dicts by parameter or scalars, so that they can lie over a
mesh as the parameters do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

MOST_SKIPPED = 10  # steps in a row that may be skipped before a run ends
_MUON_RMS = 0.2  # of a Muon update's entries, which is about AdamW's (arXiv 2502.16982): one rate suits both

_PEAKS = {"muon": 4e-3, "adamw": 1e-4}  # pipelines/EXPERIMENTS.md; the field's
_MEASURED = 576  # the hidden size at which Muon's was found


def peak(kind: str, hidden_size: int) -> float:
    """The learning rate of heads for which none is given.

    Muon's falls with the width of heads that are wider than those it was measured on: what a step of Adam,
    which moves the output head, changes of a logit grows with as many entries (arXiv 2203.03466).
    """
    return _PEAKS[kind] * (min(1, _MEASURED / hidden_size) if kind == "muon" else 1)


class Rates:
    """The learning rate of every step, which stays as it is after the last. Numbers and no formula, so that
    they are data: one program serves all rates and schedules."""

    def __init__(self, rate: optax.Schedule, steps: int):
        size = 1 << steps.bit_length()  # of few sizes, for they are part of the program
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            self.table = np.asarray(jax.vmap(rate)(jnp.arange(size, dtype=jnp.int32)), np.float32)

    def __call__(self, step: int) -> float:
        return float(self.table[min(step, len(self.table) - 1)])


def schedule(peak: float, warmup: float, steps: int, kind: str = "cosine", cooldown: float = 0.2) -> Rates:
    """Learning rate by step: linear over the first `warmup` share of `steps`, one of them at least if it is
    above 0, then as `kind` says.

    "cosine" and "linear" fall to 0, "constant" stays, "wsd" stays and falls linearly to 0 over the last
    `cooldown` share (warm-up, stable, decay: arXiv 2404.06395).
    """
    rising = max(1, round(warmup * steps)) if warmup else 0
    first, end = peak / (rising + 1), max(steps, rising + 1)
    if kind == "cosine":
        return Rates(optax.schedules.warmup_cosine_decay_schedule(first, peak, rising, end), steps)
    left = end - rising  # at least one step, into which the shares may both be rounded
    falling = {"constant": 0, "linear": left, "wsd": min(left, max(1, round(cooldown * steps)))}[kind]
    later = optax.linear_schedule(peak, 0.0, falling) if falling else optax.constant_schedule(peak)
    parts = [optax.linear_schedule(first, peak, rising), optax.constant_schedule(peak), later]
    return Rates(optax.join_schedules(parts, [rising, end - falling]), steps)


def make(
    rate: Rates | optax.Schedule,
    clip: float,
    betas: tuple[float, float],
    weight_decay: float,
    units: dict[str, Any] | None = None,
    *,
    muon: frozenset[str] = frozenset(),
    still: frozenset[str] = frozenset(),
    ema: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """clip by global norm -> AdamW or Muon -> decay of matrices, not norms -> rate -> average; guarded.

    `units` {name: [in]}: these matrices [out, in] are trained as if their inputs were divided by the units
    and the matrix multiplied by them: gradients and updates are both divided. Muon trains the matrices
    `muon`, AdamW the rest but for `still`, which stay as they are: they have no moments and count for no
    norm. `ema` is the decay of the weights' average, 0: none is kept. `update` takes the `loss` too.
    """
    units = units or {}

    def decaying(params: Any) -> dict[str, bool]:
        return {name: x.ndim > 1 and name not in still for name, x in params.items()}

    return _guarded(
        optax.chain(
            _without(still),
            _divided_by(units),
            _clipped(clip),
            _direction(betas, muon, still),
            _divided_by(units),
            optax.add_decayed_weights(weight_decay, decaying),
            _scaled(rate) if isinstance(rate, Rates) else optax.scale_by_learning_rate(rate),
            *([_averaged(ema)] if ema else []),
        )
    )


class Scaled(NamedTuple):
    """State of the rate: the number of steps, and the rate of each."""

    steps: jax.Array
    rates: jax.Array


def _scaled(rate: Rates) -> optax.GradientTransformation:
    """Its state holds the rates, as that of the units does."""

    def update(updates: Any, state: Scaled, _: Any = None) -> tuple[Any, Scaled]:
        now = state.rates.at[state.steps].get(mode="clip")
        return jax.tree.map(lambda x: -now * x, updates), Scaled(state.steps + 1, state.rates)

    return optax.GradientTransformation(lambda _: Scaled(jnp.int32(0), jnp.asarray(rate.table)), update)


def _direction(
    betas: tuple[float, float], muon: frozenset[str], still: frozenset[str]
) -> optax.GradientTransformation:
    """Adam's, or by parameter Adam's, Muon's or none at all."""
    adam = optax.scale_by_adam(*betas)
    if not muon and not still:
        return adam
    numbers = MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # weights are [out, in]
    orthogonal = scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: numbers, tree))
    sized = _stateless(lambda tree: jax.tree.map(lambda x: x * _MUON_RMS * max(x.shape) ** 0.5, tree))

    def kind(name: str) -> str:
        return "still" if name in still else "muon" if name in muon else "adam"

    return optax.partition(
        {"adam": adam, "muon": optax.chain(orthogonal, sized), "still": optax.set_to_zero()},
        lambda params: {name: kind(name) for name in params},
    )


def _stateless(update: Callable[[Any], Any]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: update(updates))


def _without(names: frozenset[str]) -> optax.GradientTransformation:
    return _stateless(lambda updates: updates | {name: jnp.zeros_like(updates[name]) for name in names})


class Clipped(NamedTuple):
    """State of clipping: the norm that was found, and limited."""

    gradient_norm: jax.Array


def _clipped(limit: float) -> optax.GradientTransformation:
    """Gradients whose norm, over all of them, is `limit` at most."""

    def update(updates: Any, _: Clipped, params: Any = None) -> tuple[Any, Clipped]:
        norm = optax.tree.norm(updates)
        scale = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda x: x * scale, updates), Clipped(norm)

    return optax.GradientTransformation(lambda _: Clipped(jnp.float32(0)), update)


def gradient_norm(state: Any, otherwise: Any = None) -> jax.Array:
    """The norm that clipping found in the step that gave this state; `otherwise` if nothing clips."""
    return optax.tree.get(state, "gradient_norm", otherwise)


def skipped(state: Any) -> tuple[jax.Array, jax.Array]:
    """How many steps were skipped: of all, and of the last ones in a row. None where nothing guards."""
    none = jnp.int32(0)
    return optax.tree.get(state, "skipped", none), optax.tree.get(state, "skipped_in_a_row", none)


def _divided_by(units: dict[str, Any]) -> optax.GradientTransformation:
    """Its state is the units: they are data, so that one program serves every store."""

    def divide(updates: dict[str, jax.Array], units: dict[str, jax.Array], _: Any) -> Any:
        return updates | {name: updates[name] / unit[None] for name, unit in units.items()}, units

    return optax.GradientTransformation(lambda _: jax.tree.map(jnp.asarray, units), divide)


class Averaged(NamedTuple):
    """State of the average: how many steps it holds, and the averaged weights."""

    steps: jax.Array
    average: Any


def _averaged(decay: float) -> optax.GradientTransformation:
    """Keeps the exponential moving average of the weights. Behind whatever else changes the updates.

    The first steps weigh less: after t of them the decay is (1 + t) / (10 + t) at most, so that the average
    of a short run is not that of its beginning.
    """

    def update(updates: Any, state: Averaged, params: Any) -> tuple[Any, Averaged]:
        steps = state.steps.astype(jnp.float32)
        by = 1 - jnp.minimum(decay, (1 + steps) / (10 + steps))
        moved = jax.tree.map(
            lambda kept, x, change: kept + by * (x + change - kept), state.average, params, updates
        )
        return updates, Averaged(state.steps + 1, moved)

    # A copy, because the parameters' own buffers are given away.
    return optax.GradientTransformation(
        lambda params: Averaged(jnp.int32(0), jax.tree.map(jnp.copy, params)), update
    )


def weights(state: Any, params: Any) -> Any:
    """What is evaluated and exported: the average where one is kept, else `params`."""
    return optax.tree.get(state, "average", params)


class Guarded(NamedTuple):
    """State of the guard: how many steps were skipped, of all and of the last in a row."""

    inner: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def _guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves everything as it is where the loss or the norm of the gradients is not finite."""

    def init(params: Any) -> Guarded:
        return Guarded(inner.init(params), jnp.int32(0), jnp.int32(0))

    def update(updates: Any, state: Guarded, params: Any = None, *, loss: Any = 0.0) -> tuple[Any, Guarded]:
        found, new = inner.update(updates, state.inner, params)
        norm = gradient_norm(new)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)

        def chosen(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

        kept = optax.tree.set(chosen(new, state.inner), gradient_norm=norm)
        bad = 1 - good.astype(jnp.int32)
        counts = state.skipped + bad, (state.skipped_in_a_row + bad) * bad
        return chosen(found, jax.tree.map(jnp.zeros_like, found)), Guarded(kept, *counts)

    return optax.GradientTransformationExtraArgs(init, update)
