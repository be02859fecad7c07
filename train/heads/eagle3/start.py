"""How an EAGLE3 head starts from a sample of the store (train/sample.py).

The aux states' half of the fit becomes `fc`. The token's half becomes the value and output projections, at
the rank that they have; queries and keys start equal, so that attention begins with a position's own token.
The MLP adds nothing yet.

Dimensions: H hidden size, N query heads, J key/value heads, d head_dim.
"""

import numpy as np

from train.heads.eagle3.sizes import Sizes
from train.sample import Sample, Weights

_SELF = 6.0  # score of a token with itself above unrelated ones: e^6 outweighs a few hundred of them


def units(c: Sizes, sample: Sample) -> Weights:
    """`fc` sums up the aux states, so each of them counts for a part of one."""
    return {"fc.weight": len(c.aux_layers) * sample.units_A}


def start(c: Sizes, noise: Weights, sample: Sample, lm_head_DH: np.ndarray | None, seed: int) -> Weights:
    """See train/heads: Head.start."""
    params = noise | {"fc.weight": noise["fc.weight"] / sample.units_A}
    if lm_head_DH is not None:
        params["lm_head.weight"] = lm_head_DH
    if sample.fit is None:
        return params
    aux_XH, token_HH = np.split(sample.fit.map_XH, [len(sample.units_A)])
    return (
        params
        | {"norm.weight": sample.fit.scale_H, "fc.weight": np.ascontiguousarray(aux_XH.T)}
        | {"midlayer.mlp.down_proj.weight": np.zeros_like(params["midlayer.mlp.down_proj.weight"])}
        | _own_token(params, c, token_HH.T, seed)
    )


def _own_token(params: Weights, c: Sizes, token_HH: np.ndarray, seed: int) -> Weights:
    """The attention's projections that add `token_HH` times the normed embedding of the own token."""
    H, N, J, d = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    u, s, v = np.linalg.svd(token_HH)
    rank = min(J * d, H)
    into, back = np.zeros((J * d, H), np.float32), np.zeros((H, J * d), np.float32)
    into[:rank], back[:, :rank] = np.sqrt(s[:rank, None]) * v[:rank], u[:, :rank] * np.sqrt(s[:rank])
    # Every query head of a group adds the same values: each takes its share.
    shares = np.repeat(back.reshape(H, J, 1, d), N // J, 2) / (N // J)
    # Equal projections with entries N(0, sigma) give a token with itself d * H * sigma^2 / sqrt(d).
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    both = rng.normal(size=(J, d, H)) * np.sqrt(_SELF / (np.sqrt(d) * H))
    out = {"midlayer.self_attn.o_proj.weight": shares.reshape(H, N * d)}
    for name, token in (("q", np.repeat(both, N // J, 0)), ("k", both), ("v", into)):
        weight = params[f"midlayer.self_attn.{name}_proj.weight"].copy()
        weight[:, :H] = token.reshape(-1, H)
        out[f"midlayer.self_attn.{name}_proj.weight"] = weight
    return out
