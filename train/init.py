"""How a head starts, and the units that its `fc` is trained in. Both come from a sample of the store.

**Units.** Some dimensions of a residual stream are thousands of times larger than others. Adam moves every
weight by about the learning rate, so those few would drown the rest: `fc` is trained as if each of its input
features had a root mean square of one (see train/optimizer.py).

**Fitted start.** A random head spends its first hundred thousand tokens on what a regression finds in
seconds: the linear map of the aux states at i and the token x[i+1] that comes nearest to the target's last
hidden state at i+1, which the target's lm_head turns into the teacher's logits. The aux states' half of the
map becomes `fc`. The token's half becomes the value and output projections, at the rank that they have;
queries and keys start equal, so that attention begins with a position's own token. The MLP adds nothing yet.

Dimensions: n samples, A aux states, H hidden size, N query heads, J key/value heads, D head_dim,
X = A * H + H features.
"""

from collections.abc import Iterator
from operator import itemgetter

import jax
import numpy as np

from common.params import initialise
from common.store import Store
from train.head import HeadConfig, parameters
from train.targets import counted_targets

Weights = dict[str, np.ndarray]
_POSITIONS = 65_536  # sampled, counted or not: 28 for each feature of a target with H=576, 3 with H=5,120
_RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the features' mean square
_KEEP_OUT = 8  # every so many-th row is for choosing the ridge
_LEAST_FACTOR = 0.1  # of the last state's size, should nothing be predictable
_SELF = 6.0  # score of a token with itself above unrelated ones: e^6 outweighs a few hundred of them


def start(
    c: HeadConfig, store: Store, rows: np.ndarray, draft_ids: np.ndarray, init: str, seed: int
) -> Weights:
    """A fresh head in float32: all N(0, 0.02) in units of its features ("normal"), with lm_head the target's
    rows ("target"), or fitted ("fitted"). The same store, rows and seed give the same head.
    """
    params = {name: np.array(x) for name, x in initialise(parameters(c), jax.random.key(seed)).items()}
    units_X = feature_units(c, store, rows, seed)
    params["fc.weight"] /= units_X
    if init == "normal":
        return params
    params["lm_head.weight"] = store.target_tensor("lm_head")[draft_ids].astype(np.float32)
    if init == "target":
        return params
    scale_H, map_XH = _fit(c, store, sample(store, rows, seed))
    params |= {"norm.weight": scale_H, "fc.weight": np.ascontiguousarray(map_XH[: len(units_X)].T)}
    params["midlayer.mlp.down_proj.weight"][:] = 0
    return params | _own_token(params, c, map_XH[len(units_X) :].T, seed)


def sample(store: Store, rows: np.ndarray, seed: int) -> np.ndarray:
    """Rows of about _POSITIONS positions, int64 ascending."""
    count = -(-_POSITIONS // store.length)
    return np.sort(np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(rows)[:count])


def feature_units(c: HeadConfig, store: Store, rows: np.ndarray, seed: int) -> np.ndarray:
    """Root mean square of every input of `fc` over the sample's documents, float32 [A * H], above 0."""
    square, n = np.zeros(len(c.aux_layers) * c.hidden_size), 0
    for row in sample(store, rows, seed):
        found = _read(store, int(row), ("segment_ids", "aux_hidden"))
        aux = found["aux_hidden"][found["segment_ids"] > 0]
        square += np.square(aux.reshape(len(aux), -1), dtype=np.float64).sum(0)
        n += len(aux)
    units = np.sqrt(square / max(n, 1))
    return np.maximum(units, 1e-4 * units.max() + 1e-12).astype(np.float32)


def _read(store: Store, row: int, names: tuple[str, ...]) -> Weights:
    """{name: [T, ...]} of one row, states in float32."""
    scaled = store.features["precision"] == "float8_e4m3fn"
    states = [name for name in names if name.endswith("_hidden")]
    scales = tuple(name.replace("hidden", "scale") for name in states) if scaled else ()
    found = {name: x[0] for name, x in store.read((*names, *scales), [row]).items()}
    for name in states:
        scale = found[name.replace("hidden", "scale")][..., None] if scaled else 1
        found[name] = found[name].astype(np.float32) * scale
    return found


def _samples(c: HeadConfig, store: Store, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features [n, X], last hidden states [n, H]) of every row's counted targets."""
    embed_VH = store.target_tensor("embed_tokens")
    for row in rows:
        found = _read(store, int(row), ("tokens", "segment_ids", "loss_mask", "aux_hidden", "last_hidden"))
        segments = found["segment_ids"]
        counted = counted_targets(segments[None], found["loss_mask"][None])[0]
        j = 1 + np.flatnonzero(counted[1:] & (segments[1:] == segments[:-1]))
        token = embed_VH[found["tokens"][j]].astype(np.float32)
        token /= np.sqrt((token**2).mean(1, keepdims=True) + c.rms_eps)
        yield (
            np.concatenate([found["aux_hidden"][j - 1].reshape(len(j), -1), token], 1),
            found["last_hidden"][j],
        )


def _fit(c: HeadConfig, store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(final norm's weight [H], map [X, H] to the last hidden state in units of its root mean square).

    A prediction varies less than what it predicts, but the final norm makes it as large: with a weight of
    the last state's size the head would begin far too sure of itself. The ridge and a factor for that weight
    are those with the least square error on rows that are kept out of the fit.
    """
    kept_out = rows[::_KEEP_OUT]
    fitted = np.setdiff1d(rows, kept_out) if len(rows) > 1 else rows
    gram_XX, cross_XH, scale_H = _moments(c, store, fitted)
    size_X = np.sqrt(np.diag(gram_XX)) + 1e-6  # every feature counts alike in the ridge
    gram_XX /= size_X[:, None] * size_X
    cross_XH /= size_X[:, None] * scale_H

    def tried(ridge: float) -> tuple[float, float, np.ndarray]:
        gram_XX[np.diag_indices(len(gram_XX))] = 1 + ridge
        map_XH = (np.linalg.solve(gram_XX, cross_XH) / size_X[:, None]).astype(np.float32)
        return *_judge(c, store, kept_out, map_XH, scale_H), map_XH

    _, factor, map_XH = min(map(tried, _RIDGES), key=itemgetter(0))
    return (factor * scale_H).astype(np.float32), map_XH


def _moments(c: HeadConfig, store: Store, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(features' products [X, X], their products with the last state [X, H], its root mean square [H])."""
    X, H = (len(c.aux_layers) + 1) * c.hidden_size, c.hidden_size
    gram_XX, cross_XH, square_H, n = np.zeros((X, X)), np.zeros((X, H)), np.zeros(H), 0
    for features, last in _samples(c, store, rows):
        gram_XX += features.T @ features
        cross_XH += features.T @ last
        square_H += np.square(last).sum(0)
        n += len(last)
    return gram_XX, cross_XH, np.sqrt(square_H / max(n, 1)) + 1e-6


def _judge(
    c: HeadConfig, store: Store, rows: np.ndarray, map_XH: np.ndarray, scale_H: np.ndarray
) -> tuple[float, float]:
    """(square error of the map's normed predictions times the best factor, as a share of nothing predicted;
    that factor)."""
    both = size = want = 0.0
    for features, last in _samples(c, store, rows):
        found, last = features @ map_XH, last / scale_H
        found /= np.sqrt(np.square(found).mean(1, keepdims=True) + c.rms_eps)
        both += float((found * last).sum())
        size += float(np.square(found).sum())
        want += float(np.square(last).sum())
    if not size:
        return 0.0, 1.0
    return 1 - both**2 / (size * want), max(both / size, _LEAST_FACTOR)


def _own_token(params: Weights, c: HeadConfig, token_HH: np.ndarray, seed: int) -> Weights:
    """The attention's projections that add `token_HH` times the normed embedding of the own token."""
    H, N, J, D = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    u, s, v = np.linalg.svd(token_HH)
    rank = min(J * D, H)
    into, back = np.zeros((J * D, H), np.float32), np.zeros((H, J * D), np.float32)
    into[:rank], back[:, :rank] = np.sqrt(s[:rank, None]) * v[:rank], u[:, :rank] * np.sqrt(s[:rank])
    # Every query head of a group adds the same values: each takes its share.
    shares = np.repeat(back.reshape(H, J, 1, D), N // J, 2) / (N // J)
    # Equal projections with entries N(0, sigma) give a token with itself D * H * sigma^2 / sqrt(D).
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    both = rng.normal(size=(J, D, H)) * np.sqrt(_SELF / (np.sqrt(D) * H))
    out = {"midlayer.self_attn.o_proj.weight": shares.reshape(H, N * D)}
    for name, token in (("q", np.repeat(both, N // J, 0)), ("k", both), ("v", into)):
        weight = params[f"midlayer.self_attn.{name}_proj.weight"].copy()
        weight[:, :H] = token.reshape(-1, H)
        out[f"midlayer.self_attn.{name}_proj.weight"] = weight
    return out
