"""Gated DeltaNet: a short causal convolution, then the gated delta rule, then a gated norm.

Behaviour: transformers `models/qwen3_next`.

Dimensions: B rows, T positions, K key heads, V value heads, G = V // K, D and E dimensions of a key and a
value, H hidden size. The projections hold, key head by key head, [q D, k D, v G*E, gate G*E] and
[beta G, decay G]; the convolution's channels are all q, then all k, then all v.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from common.layers import linear, rms_norm
from dump.target import deltakernel
from dump.target.deltarule import delta_rule, delta_rule_from
from dump.target.dense import matrix, must_divide, project, vector
from dump.target.remembering import Remembering
from dump.target.spec import F32, Context, Remembered, Weight

UNIT_EPS = 1e-6  # of the keys' and queries' normalisation


@dataclass(frozen=True)
class DeltaNet:
    """A linear attention layer."""

    recurrent: ClassVar[bool] = True  # what it remembers is a state, not one entry a position
    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    eps: float

    def weights(self, tp: int) -> dict[str, Weight]:
        must_divide(tp, self.key_heads, "key heads of linear attention")
        H, V, heads = self.hidden, self.value_heads, ("heads", None)
        channels = 2 * self.key_heads * self.key_dim + V * self.value_dim
        place = "layers.{layer}.linear_attn"
        return (
            matrix("linear_attn.in_proj_qkvz", channels + V * self.value_dim, H, heads)
            | matrix("linear_attn.in_proj_ba", 2 * V, H, heads)
            | matrix("linear_attn.out_proj", H, V * self.value_dim, (None, "heads"))
            | vector("linear_attn.norm", self.value_dim)
            | {
                "conv1d": Weight(f"{place}.conv1d.weight", (channels, 1, self.kernel), (None, None, None)),
                "A_log": Weight(f"{place}.A_log", (V,), ("heads",)),
                "dt_bias": Weight(f"{place}.dt_bias", (V,), ("heads",)),
            }
        )

    def flops(self, length: int) -> float:
        """Of the recurrence, a token: the state is read for its key and its query, and changed once."""
        return 6.0 * self.value_heads * self.key_dim * self.value_dim

    def remembers(self, length: int, tokens: int) -> dict[str, Remembered]:
        """The state before the last pass's tokens, its position, and what the rule was given for these tokens
        and for those that the convolution looks back to: so the next pass can begin behind any of them."""
        K, V, D, E = self.key_heads, self.value_heads, self.key_dim, self.value_dim
        width = 2 * D + (E + 2) * (V // K)
        return {
            "state": ((V, D, E), F32),
            "at": ((), np.dtype(np.int32)),
            "given": ((self.kernel - 1 + tokens, K, width), None),
        }

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array:
        mixed_BTM, rates = project(w, "in_proj_qkvz", x_BTH), self._rates(w, x_BTH)
        out_BTM = self.by_parts if context.cache else self._by_platform
        return context.total(linear(out_BTM(w, mixed_BTM, rates, context), w["out_proj"]))

    def _by_platform(self, w, mixed_BTM: jax.Array, rates: jax.Array, context: Context) -> jax.Array:
        ways = {"default": partial(self.by_parts, w, context=context)}
        sizes = self.key_dim, self.value_dim, self.value_heads // self.key_heads, self.kernel
        if deltakernel.serves(mixed_BTM, *sizes):
            ways["tpu"] = partial(self.by_kernel, w, context=context)
        return jax.lax.platform_dependent(mixed_BTM, rates, **ways)

    def by_parts(self, w, mixed_BTM: jax.Array, rates: jax.Array, context: Context) -> jax.Array:
        """What out_proj is given [B, T, V E] of what in_proj_qkvz gives."""
        (B, T), D, E = mixed_BTM.shape[:2], self.key_dim, self.value_dim
        G = self.value_heads // self.key_heads
        mixed = mixed_BTM.reshape(B, T, -1, 2 * D + 2 * G * E)
        q, k, v, gate = jnp.split(mixed, (D, 2 * D, 2 * D + G * E), -1)
        if context.cache:
            out = self._remembered(w, jnp.concatenate([q, k, v, rates], -1), context)
        else:
            parts = self._convolve(w["conv1d"], (q, k, v), context.segments_BT, context)
            out = delta_rule(*self._given(w, parts, rates), context.segments_BT)
        out = out.astype(mixed.dtype)
        out = rms_norm(out, w["norm"], self.eps).astype(jnp.float32)
        out = out * jax.nn.silu(gate.reshape(out.shape).astype(jnp.float32))
        return out.astype(mixed.dtype).reshape(B, T, -1)

    def by_kernel(
        self, w, mixed_BTM: jax.Array, rates: jax.Array, context: Context, interpret: bool = False
    ) -> jax.Array:
        """The same; `interpret` runs the kernel's steps one by one, on any device."""
        K = rates.shape[2]
        speed_KG = -jnp.exp(w["A_log"].astype(jnp.float32)).reshape(K, -1)
        taps_XKc = jnp.concatenate(self._kernels(w["conv1d"], K, context), 1).transpose(2, 0, 1)
        given = (
            mixed_BTM,
            rates,
            w["dt_bias"].astype(jnp.float32).reshape(K, -1),
            speed_KG,
            taps_XKc,
            w["norm"],
        )
        return deltakernel.mix(self.eps, UNIT_EPS, *given, context.segments_BT, interpret=interpret)

    def _rates(self, w: Mapping[str, jax.Array], x_BTH: jax.Array) -> jax.Array:
        """[B, T, K, 2 G]: what beta and the decay are made of."""
        B, T = x_BTH.shape[:2]
        return project(w, "in_proj_ba", x_BTH).reshape(B, T, -1, 2 * self.value_heads // self.key_heads)

    def _given(self, w, parts: list[jax.Array], rates: jax.Array) -> tuple[jax.Array, ...]:
        """What the delta rule is given: queries, keys, values, decay and beta, value head by value head."""
        (q, k, v), (B, T) = parts, rates.shape[:2]
        G = self.value_heads // self.key_heads
        rates = rates.astype(jnp.float32)
        beta = jax.nn.sigmoid(rates[..., :G]).reshape(B, T, -1)
        step = jax.nn.softplus(
            rates[..., G:].reshape(B, T, -1) + w["dt_bias"].astype(jnp.float32)[None, None]
        )
        decay = -jnp.exp(w["A_log"].astype(jnp.float32))[None, None] * step
        q, k = (jnp.repeat(_unit(x, scale), G, 2) for x, scale in ((q, self.key_dim**-0.5), (k, 1.0)))
        return q, k, v.reshape(B, T, -1, self.value_dim), decay, beta

    def _remembered(self, w, new_BTKX: jax.Array, context: Remembering) -> jax.Array:
        """The rule's results [B, T, V, E] behind what the cache has."""
        tail, T = self.kernel - 1, new_BTKX.shape[1]
        held = context.recall("given")
        if context.lengths_b is None:
            ahead_B = context.starts_b - context.recall("at")
            _, state = self._advance(w, held, context.recall("state"), ahead_B, context)
            whole = jnp.concatenate([_slices(held, ahead_B, tail), new_BTKX], 1)
            out, _ = self._advance(w, whole, state, jnp.full_like(ahead_B, T), context)
            at_B = context.starts_b
        else:
            whole = jnp.pad(new_BTKX, ((0, 0), (tail, 0), (0, 0), (0, 0)))
            state = jnp.zeros_like(context.recall("state"))
            out, state = self._advance(w, whole, state, context.lengths_b, context)
            at_B = context.lengths_b
            whole = _slices(whole, at_B, tail)
        context.keep("state", state)
        context.keep("at", at_B)
        context.keep("given", jnp.pad(whole, ((0, 0), (0, held.shape[1] - whole.shape[1]), (0, 0), (0, 0))))
        return out

    def _advance(self, w, given_BTKX, state_BVDE, counts_B, context: Context) -> tuple[jax.Array, jax.Array]:
        """(results, state) of `counts` positions from that state on; the convolution looks back to those in
        front of them in `given`."""
        D, G = self.key_dim, self.value_heads // self.key_heads
        tail, (B, T) = self.kernel - 1, given_BTKX.shape[:2]
        q, k, v, rates = jnp.split(given_BTKX, (D, 2 * D, 2 * D + G * self.value_dim), -1)
        everywhere = jnp.ones((B, T), jnp.int32)
        parts = self._convolve(w["conv1d"], (q, k, v), everywhere, context)
        q, k, v, decay, beta = self._given(w, [x[:, tail:] for x in parts], rates[:, tail:])
        counted = (jnp.arange(T - tail)[None] < counts_B[:, None])[..., None]
        decay, beta = (jnp.where(counted, x, 0.0) for x in (decay, beta))
        return delta_rule_from(state_BVDE, q, k, v, decay, beta)

    def _convolve(
        self, kernel_C1K: jax.Array, parts: tuple[jax.Array, ...], segments_BT: jax.Array, context: Context
    ) -> list[jax.Array]:
        """silu of each channel convolved over its document's last positions; parts are [B, T, heads, n]."""
        kernels = self._kernels(kernel_C1K, parts[0].shape[2], context)
        return [_causal(x, kernel, segments_BT) for x, kernel in zip(parts, kernels, strict=True)]

    def _kernels(self, kernel_C1K: jax.Array, heads: int, context: Context) -> list[jax.Array]:
        """The convolution's kernels [heads, n, K] of this chip's channels of q, k and v."""
        found, start = [], 0
        for width in (self.key_dim, self.key_dim, self.value_heads // self.key_heads * self.value_dim):
            first = start + context.chip() * heads * width
            own = jax.lax.dynamic_slice_in_dim(kernel_C1K[:, 0], first, heads * width)
            found.append(own.reshape(heads, width, -1))
            start += self.key_heads * width
        return found


def _causal(x_BTXY: jax.Array, kernel_XYK: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """silu of a causal convolution; kernel[-1] weighs the position itself."""
    T = x_BTXY.shape[1]
    total = jnp.zeros_like(x_BTXY, jnp.float32)
    for back in range(kernel_XYK.shape[-1]):
        shifted = jnp.pad(x_BTXY, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, :T]
        before = jnp.pad(segments_BT, ((0, 0), (back, 0)), constant_values=-1)[:, :T]
        same = (before == segments_BT)[..., None, None]
        weight = kernel_XYK[None, None, ..., -1 - back].astype(jnp.float32)
        total = total + jnp.where(same, shifted.astype(jnp.float32), 0.0) * weight
    return jax.nn.silu(total).astype(x_BTXY.dtype)


def _slices(x_BTKX: jax.Array, starts_B: jax.Array, size: int) -> jax.Array:
    """[B, size, K, X]: of each row the positions from its own start on."""
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size))(x_BTKX, starts_B)


def _unit(x: jax.Array, scale: float) -> jax.Array:
    """x over its length, times `scale`; computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * (scale * jax.lax.rsqrt((x32 * x32).sum(-1, keepdims=True) + UNIT_EPS))).astype(x.dtype)
