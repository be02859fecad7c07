"""AdamW over float32 masters: warm-up, cosine to zero, clipping by the norm of all gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def schedule(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Learning rate by step: linear over the first `warmup` share of `steps`, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    return optax.schedules.warmup_cosine_decay_schedule(
        peak / (rising + 1), peak, rising, max(steps, rising + 1)
    )


def make(
    rate: optax.Schedule,
    clip: float,
    betas: tuple[float, float],
    weight_decay: float,
    units: dict[str, Any] | None = None,
) -> optax.GradientTransformation:
    """clip by global norm -> AdamW; matrices decay, norms do not.

    `units` {name: [in]}: these matrices [out, in] are trained as if their inputs were divided by the units
    and the matrix multiplied by them: gradients and updates are both divided.
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        _divided_by(units or {}),
        _clipped(clip),
        optax.scale_by_adam(*betas),
        _divided_by(units or {}),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
    )


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


def gradient_norm(state: Any, otherwise: jax.Array) -> jax.Array:
    """The norm that clipping found in the step that gave this state; `otherwise` if nothing clips."""
    return optax.tree.get(state, "gradient_norm", otherwise)


def _divided_by(units: dict[str, Any]) -> optax.GradientTransformation:
    """Its state is the units: they are data, so that one program serves every store."""

    def divide(updates: dict[str, jax.Array], units: dict[str, jax.Array], _: Any) -> Any:
        return updates | {name: updates[name] / unit[None] for name, unit in units.items()}, units

    return optax.GradientTransformation(lambda _: jax.tree.map(jnp.asarray, units), divide)
