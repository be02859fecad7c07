"""AdamW over float32 masters: warm-up, cosine to zero, clipping by the norm of all gradients."""

from typing import Any

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
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(*betas),
        _divided_by(units or {}),
        optax.add_decayed_weights(weight_decay, matrices),
        optax.scale_by_learning_rate(rate),
    )


def _divided_by(units: dict[str, Any]) -> optax.GradientTransformation:
    def divide(updates: dict[str, jax.Array], _: Any) -> dict[str, jax.Array]:
        return updates | {name: updates[name] / jnp.asarray(unit)[None] for name, unit in units.items()}

    return optax.stateless(divide)
