"""How an EAGLE3 head starts from a sample of the store (train/sample.py).

The aux states' half of the fit becomes `fc`. The token's half becomes the value and output projections, at
the rank that they have; queries and keys start equal, so that attention begins with a position's own token.
The MLP adds nothing yet, nor does any later layer.

Dimensions: H hidden size, N query heads, J key/value heads, d head_dim, r a rank.
"""

from typing import Any

import jax
import jax.numpy as jnp

from common.layers import einsum
from train.batch import Params
from train.heads.eagle3.sizes import Sizes
from train.sample import Sample

_SELF = 6.0  # score of a token with itself above unrelated ones: e^6 outweighs a few hundred of them
# Root mean square of the state that a fit begins with. The final norm undoes it, but what the layers come to
# add is measured by it. One fit on 31k tokens of a target with H = 576, at rates of 4e-4: from 0.7 the first
# steps at the full rate throw it back, and the first token's loss ends at 4.45; from 1.1 at 4.35, from 2.2 at
# 4.31. Another: from 1 at 4.54, from 2 and from 4 at 4.41.
_SIZE = 2.0
_ROUNDS, _SPARE = 4, 1.25  # of the search for the greatest directions of a matrix, and how many it looks at


def units(c: Sizes, sample: Sample) -> Params:
    """`fc` sums up the aux states, so each of them counts for a part of one."""
    return {"fc.weight": len(c.aux_layers) * sample.units_A / _sizes(c, sample)}


def _sizes(c: Sizes, sample: Sample) -> jax.Array:
    """[A * H]: by what `fc` finds its inputs divided, the size of each aux state where those are normed."""
    if not c.fc_norm:
        return jnp.ones_like(sample.units_A)
    by_state = jnp.sqrt(jnp.square(sample.units_A).reshape(len(c.aux_layers), -1).mean(1))
    return jnp.repeat(by_state, len(sample.units_A) // len(by_state))


def start(c: Sizes, noise: Params, sample: Sample, lm_head_DH: jax.Array | None, key: jax.Array) -> Params:
    """See train/heads/head.py: Head.start."""
    sizes_A = _sizes(c, sample)
    params = noise | {"fc.weight": noise["fc.weight"] * sizes_A[None] / sample.units_A[None]}
    if lm_head_DH is not None:
        params["lm_head.weight"] = lm_head_DH.astype(jnp.float32)
    if sample.fit is None:
        return params
    aux_XH, token_HH = jnp.split(sample.fit.map_XH, [len(sample.units_A)])
    return (
        params
        | {"norm.weight": sample.fit.scale_H, "fc.weight": _SIZE * aux_XH.T * sizes_A[None]}
        | {name: jnp.zeros_like(params[name]) for name in params if _adds_nothing_yet(name)}
        # Where the aux states' part is normed before the token's is added, it has a size of one.
        | _own_token(params, c, token_HH.T, 1 / sample.fit.aux_size if c.norm_before_residual else _SIZE, key)
    )


def _adds_nothing_yet(name: str) -> bool:
    """The MLP of the first layer, and all of later ones."""
    last = name.endswith("mlp.down_proj.weight")
    return last or (name.startswith("layers.") and name.endswith("self_attn.o_proj.weight"))


def _own_token(params: Params, c: Sizes, token_HH: jax.Array, times: Any, key: jax.Array) -> Params:
    """The attention's projections that add `times` token_HH times the normed embedding of the own token."""
    H, N, J, d = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    rank = min(J * d, H)
    back_Hr, into_rH = halves(token_HH, rank, jax.random.fold_in(key, 1))
    into = jnp.zeros((J * d, H), jnp.float32).at[:rank].set(into_rH)
    back = jnp.zeros((H, J * d), jnp.float32).at[:, :rank].set(back_Hr)
    # Every query head of a group adds the same values: each takes its share.
    shares = times * jnp.repeat(back.reshape(H, J, 1, d), N // J, 2) / (N // J)
    # Equal projections with entries N(0, sigma) give a token with itself d * H * sigma^2 / sqrt(d).
    both = jax.random.normal(key, (J, d, H)) * (_SELF / (d**0.5 * H)) ** 0.5
    out = {"midlayer.self_attn.o_proj.weight": shares.reshape(H, N * d)}
    for name, token in (("q", jnp.repeat(both, N // J, 0)), ("k", both), ("v", into)):
        full = f"midlayer.self_attn.{name}_proj.weight"
        out[full] = params[full].at[:, :H].set(token.reshape(-1, H))
    return out


def halves(matrix_HH: jax.Array, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(back [H, r], into [r, H]), equally large: back @ into is the best approximation of that rank.

    By subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4): matmuls, where all of
    a singular value decomposition would take an hour of H = 5,120 on a TPU's vector units.
    """
    H = len(matrix_HH)
    width = min(H, int(_SPARE * rank))
    basis_Hw = jnp.eye(H, dtype=jnp.float32)
    if width < H:
        basis_Hw = einsum("hi,iw->hw", matrix_HH, jax.random.normal(key, (H, width)))
        for _ in range(_ROUNDS):
            other = jnp.linalg.qr(einsum("hi,hw->iw", matrix_HH, jnp.linalg.qr(basis_Hw)[0]))[0]
            basis_Hw = einsum("hi,iw->hw", matrix_HH, other)
        basis_Hw = jnp.linalg.qr(basis_Hw)[0]
    inside_wH = einsum("hw,hi->wi", basis_Hw, matrix_HH)
    turn_ww = jnp.linalg.eigh(einsum("wi,vi->wv", inside_wH, inside_wH))[1][:, ::-1]
    found_rH = einsum("wr,wi->ri", turn_ww[:, :rank], inside_wH)
    size_r = jnp.sqrt(jnp.linalg.norm(found_rH, axis=1)) + 1e-20
    return einsum("hw,wr->hr", basis_Hw, turn_ww[:, :rank]) * size_r[None], found_rH / size_r[:, None]
