"""What a head's logits lose against a teacher: each loss is one function of a chunk of targets.

p is the teacher over the draft vocabulary, renormalised; q is the head; alpha = sum_v min(mass * p_v, q_v) is
the acceptance at temperature 1, `mass` the draft vocabulary's share of the teacher's whole distribution.

- cross-entropy: -sum_v p_v log q_v, what EAGLE-3 trains with (arXiv 2503.01840).
- hard-labels: -log q of the target's first choice.
- forward-kl: sum_v p_v log(p_v / q_v): cross entropy, but 0 for a head that knows all.
- reverse-kl: sum_v q_v log(q_v / p_v), which a head lowers by leaving out what it can't tell apart.
- lk-alpha: -log alpha; lk-lambda: w * cross entropy + (1 - w) * (1 - alpha), w = scale * exp(-decay * alpha)
  (arXiv 2602.23881).

Dimensions: c a chunk of targets, K TTT steps, D draft vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Taught(NamedTuple):
    """The target's distribution at the targets of a chunk, float32."""

    logp_cKD: (
        jax.Array
    )  # over the draft vocabulary, renormalised; [c, 1, D] where it is the same at all steps
    mass_c: jax.Array  # the share of the whole distribution that the draft vocabulary holds, at most 1
    argmax_c: jax.Array  # int32 draft index of the whole vocabulary's argmax; -1 if the draft lacks it


Loss = Callable[[jax.Array, Taught], jax.Array]  # (float32 logits [c, K, D], teacher) -> float32 [c, K]


def make(name: str, scale: float = 1.0, decay: float = 3.0, temperature: float = 1.0) -> Loss:
    """The loss of that name. `scale` and `decay` are lk-lambda's, `temperature` is the teacher's."""
    loss = {
        "cross-entropy": cross_entropy,
        "hard-labels": hard_labels,
        "forward-kl": forward_kl,
        "reverse-kl": reverse_kl,
        "lk-alpha": lk_alpha,
        "lk-lambda": partial(lk_lambda, scale=scale, decay=decay),
    }[name]
    return loss if temperature == 1.0 else partial(_tempered, loss, temperature)


def cross_entropy(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """-sum_v p_v log q_v."""
    return jax.nn.logsumexp(logits_cKD, axis=-1) - (jnp.exp(taught.logp_cKD) * logits_cKD).sum(-1)


def hard_labels(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """-log q of the target's argmax."""
    place_D = jnp.arange(logits_cKD.shape[-1], dtype=jnp.int32)[None, None]
    its_cK = jnp.where(place_D == taught.argmax_c[:, None, None], logits_cKD, 0.0).sum(-1)
    return jax.nn.logsumexp(logits_cKD, axis=-1) - its_cK


def forward_kl(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v p_v log(p_v / q_v)."""
    return cross_entropy(logits_cKD, taught) + (jnp.exp(taught.logp_cKD) * taught.logp_cKD).sum(-1)


def reverse_kl(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v q_v log(q_v / p_v)."""
    logq_cKD = jax.nn.log_softmax(logits_cKD, axis=-1)
    return (jnp.exp(logq_cKD) * (logq_cKD - taught.logp_cKD)).sum(-1)


def acceptance(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v min(p_v, q_v) [c, K], p over the whole vocabulary: acceptance at temperature 1."""
    p_cKD = jnp.exp(taught.logp_cKD) * taught.mass_c[:, None, None]
    return jnp.minimum(p_cKD, jax.nn.softmax(logits_cKD, axis=-1)).sum(-1)


def acceptance_of(logits_cKD: jax.Array, taught: Taught, token_c: jax.Array) -> jax.Array:
    """min(1, q / p) [c, K] of one token each, p over the whole vocabulary: the probability that it was the
    draft's, given that the target drew it. 0 for tokens of -1, which the draft vocabulary lacks."""
    is_it_cKD = jnp.arange(logits_cKD.shape[-1], dtype=jnp.int32)[None, None] == token_c[:, None, None]
    logq_cK = jnp.where(is_it_cKD, logits_cKD, 0.0).sum(-1) - jax.nn.logsumexp(logits_cKD, axis=-1)
    logp_cK = jnp.where(is_it_cKD, taught.logp_cKD, 0.0).sum(-1) + jnp.log(taught.mass_c)[:, None]
    return jnp.where(token_c[:, None] < 0, 0.0, jnp.exp(jnp.minimum(logq_cK - logp_cK, 0.0)))


def lk_alpha(logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """-log alpha."""
    return -jnp.log(jnp.maximum(acceptance(logits_cKD, taught), jnp.finfo(jnp.float32).tiny))


def lk_lambda(logits_cKD: jax.Array, taught: Taught, scale: float, decay: float) -> jax.Array:
    """w * cross entropy + (1 - w) * (1 - alpha), w = scale * exp(-decay * alpha) without a gradient."""
    alpha_cK = acceptance(logits_cKD, taught)
    w_cK = scale * jnp.exp(-decay * jax.lax.stop_gradient(alpha_cK))
    return w_cK * cross_entropy(logits_cKD, taught) + (1 - w_cK) * (1 - alpha_cK)


def _tempered(loss: Loss, temperature: float, logits_cKD: jax.Array, taught: Taught) -> jax.Array:
    """`loss` with the teacher's logits divided by `temperature`."""
    return loss(
        logits_cKD, taught._replace(logp_cKD=jax.nn.log_softmax(taught.logp_cKD / temperature, axis=-1))
    )
