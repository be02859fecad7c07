"""Positive definite systems too large for XLA's own solver: for X of 20,480 it wants 35 GiB of a TPU.

Cholesky's factor in place, a block of columns at a time, and everything else by matmuls with whole columns:
six times the FLOPs that are needed, in one small loop. The TPU compiler expects 245 ms, and 3 GiB beside the
system. Source: the right-looking form in Golub and Van Loan, Matrix Computations, section 4.2.

Dimensions: X unknowns, filled up to whole blocks; H right-hand sides; b columns of a block.
"""

import jax
import jax.numpy as jnp

from common.layers import einsum

BLOCK = 1024


def solve(matrix_XX: jax.Array, wanted_XH: jax.Array) -> jax.Array:
    """found [X, H] with matrix @ found = wanted, float32; NaN where the matrix is not positive definite."""
    X, blocks = len(matrix_XX), -(-len(matrix_XX) // BLOCK)
    b = -(-X // blocks)
    more = blocks * b - X
    place_X = jnp.arange(blocks * b, dtype=jnp.int32)
    matrix = jnp.pad(matrix_XX, (0, more))
    matrix = jnp.where((place_X[:, None] == place_X[None]) & (place_X >= X)[:, None], 1.0, matrix)

    def forwards(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """What is left of the matrix, with the factor's columns in its first ones; the inverses of the
        factor's diagonal blocks; the right-hand sides, solved by the factor up to here."""
        matrix, inverses, found = carry
        columns_Xb, start = jax.lax.dynamic_slice_in_dim(matrix, k * b, b, 1), k * b
        diagonal_bb = jax.lax.dynamic_slice_in_dim(columns_Xb, start, b)
        lower_bb = jax.lax.linalg.cholesky(diagonal_bb, symmetrize_input=False)
        inverse_bb = jax.lax.linalg.triangular_solve(
            lower_bb, jnp.eye(b, dtype=jnp.float32), left_side=True, lower=True
        )
        factor_Xb = jnp.where((place_X >= start)[:, None], einsum("xc,bc->xb", columns_Xb, inverse_bb), 0.0)
        here_bH = einsum("bc,ch->bh", inverse_bb, jax.lax.dynamic_slice_in_dim(found, start, b))
        matrix = matrix - einsum("xb,yb->xy", factor_Xb, factor_Xb)
        matrix = jax.lax.dynamic_update_slice_in_dim(matrix, factor_Xb, start, 1)
        found = found - einsum("xb,bh->xh", factor_Xb, here_bH)
        found = jax.lax.dynamic_update_slice_in_dim(found, here_bH, start, 0)
        return matrix, jax.lax.dynamic_update_index_in_dim(inverses, inverse_bb, k, 0), found

    carry = matrix, jnp.zeros((blocks, b, b), jnp.float32), jnp.pad(wanted_XH, ((0, more), (0, 0)))
    factor, inverses, half = jax.lax.fori_loop(0, blocks, forwards, carry)

    def backwards(number: jax.Array, found: jax.Array) -> jax.Array:
        k = blocks - 1 - number
        columns_Xb = jax.lax.dynamic_slice_in_dim(factor, k * b, b, 1)
        behind_XH = jnp.where((place_X >= (k + 1) * b)[:, None], found, 0.0)
        left_bH = jax.lax.dynamic_slice_in_dim(found, k * b, b) - einsum("xb,xh->bh", columns_Xb, behind_XH)
        here_bH = einsum("cb,ch->bh", inverses[k], left_bH)
        return jax.lax.dynamic_update_slice_in_dim(found, here_bH, k * b, 0)

    return jax.lax.fori_loop(0, blocks, backwards, half)[:X]
