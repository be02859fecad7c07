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

    logp_KcD: (
        jax.Array
    )  # over the draft vocabulary, renormalised; [1, c, D] where it is the same at all steps
    mass_c: jax.Array  # the share of the whole distribution that the draft vocabulary holds, at most 1
    argmax_c: jax.Array  # int32 draft index of the whole vocabulary's argmax; -1 if the draft lacks it


Loss = Callable[[jax.Array, Taught], jax.Array]  # (float32 logits [K, c, D], teacher) -> float32 [K, c]


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


def cross_entropy(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """-sum_v p_v log q_v."""
    return jax.nn.logsumexp(logits_KcD, axis=-1) - (jnp.exp(taught.logp_KcD) * logits_KcD).sum(-1)


def hard_labels(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """-log q of the target's argmax."""
    place_D = jnp.arange(logits_KcD.shape[-1], dtype=jnp.int32)[None, None]
    its_Kc = jnp.where(place_D == taught.argmax_c[None, :, None], logits_KcD, 0.0).sum(-1)
    return jax.nn.logsumexp(logits_KcD, axis=-1) - its_Kc


def forward_kl(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v p_v log(p_v / q_v)."""
    return cross_entropy(logits_KcD, taught) + (jnp.exp(taught.logp_KcD) * taught.logp_KcD).sum(-1)


def reverse_kl(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v q_v log(q_v / p_v)."""
    logq_KcD = jax.nn.log_softmax(logits_KcD, axis=-1)
    return (jnp.exp(logq_KcD) * (logq_KcD - taught.logp_KcD)).sum(-1)


def acceptance(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """sum_v min(p_v, q_v) [K, c], p over the whole vocabulary: acceptance at temperature 1."""
    p_KcD = jnp.exp(taught.logp_KcD) * taught.mass_c[None, :, None]
    return jnp.minimum(p_KcD, jax.nn.softmax(logits_KcD, axis=-1)).sum(-1)


def acceptance_of(logits_KcD: jax.Array, taught: Taught, token_c: jax.Array) -> jax.Array:
    """min(1, q / p) [K, c] of one token each, p over the whole vocabulary: the probability that it was the
    draft's, given that the target drew it. 0 for tokens of -1, which the draft vocabulary lacks."""
    is_it_KcD = jnp.arange(logits_KcD.shape[-1], dtype=jnp.int32)[None, None] == token_c[None, :, None]
    logq_Kc = jnp.where(is_it_KcD, logits_KcD, 0.0).sum(-1) - jax.nn.logsumexp(logits_KcD, axis=-1)
    logp_Kc = jnp.where(is_it_KcD, taught.logp_KcD, 0.0).sum(-1) + jnp.log(taught.mass_c)[None]
    return jnp.where(token_c[None] < 0, 0.0, jnp.exp(jnp.minimum(logq_Kc - logp_Kc, 0.0)))


def lk_alpha(logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """-log alpha, by logarithms: alpha of a head that is sure of other tokens is less than a float32 holds,
    and it would learn nothing."""
    tiny = jnp.finfo(jnp.float32).tiny  # more than that has the draft vocabulary of every target that counts
    logp_KcD = taught.logp_KcD + jnp.log(jnp.maximum(taught.mass_c, tiny))[None, :, None]
    return -jax.nn.logsumexp(jnp.minimum(logp_KcD, jax.nn.log_softmax(logits_KcD, axis=-1)), axis=-1)


def lk_lambda(logits_KcD: jax.Array, taught: Taught, scale: float, decay: float) -> jax.Array:
    """w * cross entropy + (1 - w) * (1 - alpha), w = scale * exp(-decay * alpha) without a gradient."""
    alpha_Kc = acceptance(logits_KcD, taught)
    w_Kc = scale * jnp.exp(-decay * jax.lax.stop_gradient(alpha_Kc))
    return w_Kc * cross_entropy(logits_KcD, taught) + (1 - w_Kc) * (1 - alpha_Kc)


def _tempered(loss: Loss, temperature: float, logits_KcD: jax.Array, taught: Taught) -> jax.Array:
    """`loss` with the teacher's logits divided by `temperature`."""
    return loss(
        logits_KcD, taught._replace(logp_KcD=jax.nn.log_softmax(taught.logp_KcD / temperature, axis=-1))
    )
