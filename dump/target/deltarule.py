"""The gated delta rule in chunks: a recurrent state that decays, corrected towards each key's value.

S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t') + beta_t k_t v_t',  out_t = S_t' q_t, with S = 0 at the start of
every document. Inside a chunk the recurrence is a triangular system, so that all work is matmuls.
Source: Gated Delta Networks (arXiv 2412.06464), chunked form of arXiv 2406.06484.

Dimensions: B rows, T positions, N heads, D of a key, E of a value; Z chunks of C positions (i, j within one).
"""

import jax
import jax.numpy as jnp

from common.layers import einsum

CHUNK = 64  # positions: the size of the matmuls, and of the triangular systems


def delta_rule(
    q_BTND: jax.Array,
    k_BTND: jax.Array,
    v_BTNE: jax.Array,
    decay_BTN: jax.Array,
    beta_BTN: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """out float32 [B, T, N, E]. `decay` is log-space (at most 0); queries and keys come normalised.

    Decays and beta are float32. Matmuls take the queries', keys' and values' dtype and sum in float32; the
    triangular systems are solved in float32 and the state is kept in it.
    """
    return _in_chunks(q_BTND, k_BTND, v_BTNE, decay_BTN, beta_BTN, segments_BT, None)[0]


def delta_rule_from(
    state_BNDE: jax.Array,
    q_BTND: jax.Array,
    k_BTND: jax.Array,
    v_BTNE: jax.Array,
    decay_BTN: jax.Array,
    beta_BTN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(out float32 [B, T, N, E], state float32 [B, N, D, E]) of one document a row, from a state on.

    Positions of decay 0 and beta 0 leave the state as it is. A few positions are computed one by one.
    """
    T = q_BTND.shape[1]
    if T >= CHUNK:
        # What fills the last chunk belongs to the document too, as the state goes through it.
        filled_BT = jnp.ones((q_BTND.shape[0], T + -T % CHUNK), jnp.int32)
        return _in_chunks(q_BTND, k_BTND, v_BTNE, decay_BTN, beta_BTN, filled_BT, state_BNDE)
    given = (x.astype(jnp.float32).swapaxes(0, 1) for x in (q_BTND, k_BTND, v_BTNE, decay_BTN, beta_BTN))
    state_BNDE, out_TBNE = jax.lax.scan(_position, state_BNDE, tuple(given))
    return out_TBNE.swapaxes(0, 1), state_BNDE


def _position(state_BNDE: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q_BND, k_BND, v_BNE, decay_BN, beta_BN = given
    state = state_BNDE * jnp.exp(decay_BN)[..., None, None]
    new_BNE = (v_BNE - einsum("bnd,bnde->bne", k_BND, state)) * beta_BN[..., None]
    state = state + k_BND[..., None] * new_BNE[..., None, :]
    return state, einsum("bnd,bnde->bne", q_BND, state)


def _in_chunks(q_BTND, k_BTND, v_BTNE, decay_BTN, beta_BTN, segments_BT, state_BNDE):
    """(out, state behind the last chunk); `state_BNDE` None: the rows begin with it as 0."""
    T, dtype = q_BTND.shape[1], q_BTND.dtype
    q, k, v = (_chunks(x) for x in (q_BTND, k_BTND, v_BTNE))
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    beta, decay = _chunks(beta_BTN[..., None])[..., 0], _chunks(decay_BTN[..., None])[..., 0]
    segments_ZBC = _chunks(segments_BT[:, :, None, None])[:, :, 0, :, 0]
    total = jnp.cumsum(decay, -1)  # [Z, B, N, C]
    within = _within(total, segments_ZBC)
    system = einsum("zbnid,zbnjd->zbnij", k, k) * beta[..., None] * within
    both = jnp.concatenate([v32, k32 * jnp.exp(total)[..., None]], -1) * beta[..., None]
    solved = einsum("zbnij,zbnje->zbnie", _inverse(system).astype(dtype), both.astype(dtype))
    new_values, old_keys = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    reads, writes, survives = crossings(segments_ZBC)
    steps = (
        (einsum("zbnid,zbnjd->zbnij", q, k) * within).astype(dtype),
        new_values,
        (old_keys * reads).astype(dtype),
        (q32 * jnp.exp(total)[..., None] * reads).astype(dtype),
        (k32 * jnp.exp(total[..., -1:] - total)[..., None] * writes).astype(dtype),
        jnp.exp(total[..., -1])[..., None, None] * survives,
    )
    if state_BNDE is None:
        state_BNDE = jnp.zeros_like(einsum("bnid,bnie->bnde", k[0], v[0]))
    state_BNDE, out_ZBNCE = jax.lax.scan(_step, state_BNDE, steps)
    out_BTNE = out_ZBNCE.transpose(1, 0, 3, 2, 4).reshape(q_BTND.shape[0], -1, *v_BTNE.shape[2:])
    return out_BTNE[:, :T], state_BNDE


def _inverse(system_ZBNij: jax.Array) -> jax.Array:
    """Inverse of a lower triangle with ones on its diagonal, whatever is stored on and above it.

    Blocks of the diagonal are inverted in ever larger sizes: that of [[P, 0], [R, Q]] is
    [[P', 0], [-Q' R P', Q']]. All of it is matmuls, which a triangular solver is not.
    """
    i, j = jnp.arange(CHUNK)[:, None], jnp.arange(CHUNK)[None]

    def corners(size: int) -> jax.Array:
        """R of all pairs of blocks of `size`."""
        below = (i // size == j // size + 1) & (i // (2 * size) == j // (2 * size))
        return jnp.where(below[None, None, None], system_ZBNij, 0.0)

    inverse = jnp.eye(CHUNK, dtype=jnp.float32)[None, None, None] - corners(1)  # P and Q are 1 there
    size = 2
    while size < CHUNK:
        left = einsum("zbnij,zbnjk->zbnik", inverse, corners(size))
        inverse, size = inverse - einsum("zbnij,zbnjk->zbnik", left, inverse), 2 * size
    return inverse


def _step(state_BNDE: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """One chunk: what the old state predicts is taken off the new values, then both are read."""
    attention, new_values, old_keys, queries, keys, survives = step
    state = state_BNDE.astype(keys.dtype)
    values = (new_values - einsum("bnid,bnde->bnie", old_keys, state)).astype(keys.dtype)
    out = einsum("bnid,bnde->bnie", queries, state) + einsum("bnij,bnje->bnie", attention, values)
    return state_BNDE * survives + einsum("bnid,bnie->bnde", keys, values), out


def _chunks(x_BTND: jax.Array) -> jax.Array:
    """[B, T, N, D] -> [Z, B, N, C, D], zeros behind the end."""
    B, T, N, D = x_BTND.shape
    padded = jnp.pad(x_BTND, ((0, 0), (0, -T % CHUNK), (0, 0), (0, 0)))
    return padded.reshape(B, -1, CHUNK, N, D).transpose(1, 0, 3, 2, 4)


def _within(total_ZBNC: jax.Array, segments_ZBC: jax.Array) -> jax.Array:
    """Decay [Z, B, N, i, j] from position j to a later or equal i of the same document, else 0."""
    later = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None]
    seen = (later & (segments_ZBC[..., :, None] == segments_ZBC[..., None, :]))[:, :, None]
    return jnp.exp(jnp.where(seen, total_ZBNC[..., :, None] - total_ZBNC[..., None, :], -jnp.inf))


def crossings(segments_ZBC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """1.0 where a position reads the state before its chunk, where it writes the state behind it (both
    [Z, B, 1, C, 1]), and where the state survives the chunk [Z, B, 1, 1, 1]: within one document each time.
    """
    last_ZB1 = segments_ZBC[..., -1:]
    before_ZB1 = jnp.concatenate([last_ZB1[:1], last_ZB1[:-1]])  # the first state is 0, whatever reads it
    reads, writes, survives = segments_ZBC == before_ZB1, segments_ZBC == last_ZB1, last_ZB1 == before_ZB1
    return tuple(x.astype(jnp.float32)[:, :, None, :, None] for x in (reads, writes, survives))
