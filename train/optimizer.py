"""AdamW over float32 masters: warm-up, cosine to zero, clipping by the norm of all gradients."""

from typing import Any

import jax
import optax


def schedule(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Learning rate by step: linear over the first `warmup` share of `steps`, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=peak / (rising + 1),
        peak_value=peak,
        warmup_steps=rising,
        decay_steps=max(steps, rising + 1),
    )


def make(
    rate: optax.Schedule, clip: float, betas: tuple[float, float], weight_decay: float
) -> optax.GradientTransformation:
    """clip by global norm -> AdamW; matrices decay, norms do not."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=betas[0], b2=betas[1], weight_decay=weight_decay, mask=matrices),
    )
