"""The small layers that the target and the draft head share; linear weights are [out, in].

Dimensions: B rows, T positions, N heads, d head_dim, R = half of the rotated dimensions, I in, O out.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # a logit that counts nothing; finite, so that a softmax of nothing else gives no NaN


def compute_dtype(asked: str | None) -> str:
    """The type of matmuls that was asked for; else float32 on CPU, bfloat16 on accelerators."""
    return asked or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def precision(*operands: jax.Array) -> jax.lax.Precision | None:
    """What every matmul of the project asks for: all of float32 where an operand has it.

    Accelerators round float32 operands to bfloat16, or to TF32, unless they are asked not to.
    """
    return jax.lax.Precision.HIGHEST if any(x.dtype == jnp.float32 for x in operands) else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum of two arrays, accumulated and returned in float32; every matmul of the project is one.

    Its backward pass multiplies in the operands' dtype too: autodiff would multiply by float32 cotangents.
    `spec` names every dimension, and each in two of its three parts at least.
    """
    return jnp.einsum(spec, a, b, precision=precision(a, b), preferred_element_type=jnp.float32)


def _pull_back(spec: str, operands: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    (of_a, of_b), of_g = spec.partition("->")[0].split(","), spec.partition("->")[2]
    g = g.astype(jnp.float32 if jnp.float32 in (a.dtype, b.dtype) else a.dtype)
    return (
        einsum(f"{of_g},{of_b}->{of_a}", g, b).astype(a.dtype),
        einsum(f"{of_g},{of_a}->{of_b}", g, a).astype(b.dtype),
    )


einsum.defvjp(lambda spec, a, b: (einsum(spec, a, b), (a, b)), _pull_back)


def linear(x: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x [..., I] times w transposed, in x's dtype."""
    lead = "abcdefgh"[: x.ndim - 1]
    return einsum(f"{lead}i,oi->{lead}o", x, w_OI).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last dimension, in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    scale = weight.astype(jnp.float32) + offset
    return (x32 * jnp.expand_dims(scale, range(x.ndim - weight.ndim))).astype(x.dtype)


def rope_tables(
    positions: jax.Array, inverse_R: jax.Array, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [..., R] float32 of int positions; see common/rope.py for the inverse frequencies."""
    inverse = jnp.expand_dims(jnp.asarray(inverse_R), range(positions.ndim))
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    interleaved: bool = False,
    heads: int = 2,
    start: int = 0,
) -> jax.Array:
    """Rotates 2R dimensions of every head from `start` on, the rest stays; x is [B, T, N, D], with
    `heads` = 1 [B, N, T, D].

    Dimension i is paired with i + R, or with `interleaved` 2i with 2i + 1; the interleaved result lies in
    halves, which is the same permutation for queries and keys and leaves their products alone.
    """
    ways = {"tpu": _rope_by_matmul, "default": _rope_by_halves}
    ways = {platform: partial(way, interleaved, start) for platform, way in ways.items()}
    return jax.lax.platform_dependent(x, *(jnp.expand_dims(t, heads) for t in tables), **ways)


def _rope_by_halves(interleaved: bool, start: int, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    R = cos.shape[-1]
    before, turned, behind = jnp.split(x, [start, start + 2 * R], -1)
    turned = turned.astype(jnp.float32)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :R], turned[..., R:])
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
    parts = [part for part in (before, turned, behind) if part.shape[-1]]
    return jnp.concatenate(parts, -1) if len(parts) > 1 else turned


def _rope_by_matmul(interleaved: bool, start: int, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same; a TPU moves values within a register far more slowly than through its matrix units."""
    D = x.shape[-1]
    own_DD, other_DD = rope_matrices(D, 2 * cos.shape[-1], start, interleaved)
    cos, sin = wide_tables(cos, sin, D, start)
    own = einsum("...d,de->...e", x, own_DD.astype(x.dtype)) if interleaved else x.astype(jnp.float32)
    other = einsum("...d,de->...e", x, other_DD.astype(x.dtype))
    return (own * cos + other * sin).astype(x.dtype)


def rope_matrices(
    D: int, width: int, start: int = 0, interleaved: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(own, other) [D, D]: a head x rotated in `width` dimensions from `start` on is x own cos + x other sin,
    with `wide_tables`."""
    i, every = np.arange(width // 2), np.arange(D)
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(i))
    own_DD, other_DD = np.zeros((2, D, D), np.float32)  # which input an output is made of
    source = np.concatenate([every[:start], start + a, start + b, every[start + width :]])
    own_DD[source, every] = 1
    other_DD[start + b, start + i], other_DD[start + a, start + i + len(i)] = -1, 1
    return own_DD, other_DD


def wide_tables(cos: jax.Array, sin: jax.Array, D: int, start: int = 0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [..., D] of whole heads, of which 2R dimensions from `start` on are rotated."""
    behind = D - start - 2 * cos.shape[-1]
    lead = [(0, 0)] * (cos.ndim - 1)

    def wide(table: jax.Array, fill: float) -> jax.Array:
        both = jnp.concatenate([table, table], -1)
        return jnp.pad(both, [*lead, (start, behind)], constant_values=fill)

    return wide(cos, 1.0), wide(sin, 0.0)
