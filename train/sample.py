"""What a head is told of its target before it trains: one pass over a sample of the store.

**Units.** Some dimensions of a residual stream are thousands of times larger than others. Adam moves every
weight by about the learning rate, so those few would drown the rest: a matrix that reads the aux states is
trained as if each of its inputs had a root mean square of one (see train/optimizer.py).

**Fit.** The linear map of the aux states at index i and the token that it reads, to the target's last hidden
state at its target, which the target's lm_head turns into the teacher's logits. A random head spends its
first hundred thousand tokens on what this regression finds in seconds.

Dimensions: n samples, A aux states, H hidden size, X = A * H + H features.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from common.codec import arrays_of, decode_states
from common.progress import note
from common.store import Store
from train.targets import ahead, counted_targets

Weights = dict[str, np.ndarray]
_POSITIONS = 65_536  # sampled, counted or not: 28 for each feature of a target with H=576, 3 with H=5,120
_RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the features' mean square
_KEEP_OUT = 8  # every so many-th row is for choosing the ridge
_LEAST_FACTOR = 0.1  # of the last state's size, should nothing be predictable


class Fit(NamedTuple):
    """A prediction of the last hidden state: scale * (features @ map) / rms(features @ map)."""

    map_XH: np.ndarray
    scale_H: np.ndarray


class Sample(NamedTuple):
    """What a sample says, float32."""

    units_A: np.ndarray  # [A * H]: the root mean square of every input, over all of the documents; above 0
    fit: Fit | None  # where it is asked for, and anything counts


def measure(store: Store, rows: np.ndarray, seed: int, eps: float, fitted: bool) -> Sample:
    """The sample's units, and its fit if `fitted`. The same store, rows and seed give the same.

    `eps` is added to mean squares of embeddings and predictions where they are normed.
    """
    square, n = 0.0, 0
    kept_out: list[tuple[np.ndarray, np.ndarray]] = []
    moments = _Moments()
    embed_VH = store.target_tensor("embed_tokens") if fitted else None
    for number, found in enumerate(_rows(store, rows, seed, fitted)):
        inside = found["segment_ids"] > 0
        aux = found["aux_hidden"].reshape(len(inside), -1)
        square, n = square + np.square(aux[inside], dtype=np.float64).sum(0), n + inside.sum()
        if embed_VH is None:
            continue
        samples = _features(found, aux, embed_VH, eps)
        if number % _KEEP_OUT:
            moments.add(*samples)
        else:
            kept_out.append(samples)
    if not moments.n:  # a single row is for both
        for samples in kept_out:
            moments.add(*samples)
    units = np.sqrt(square / max(n, 1))
    units = np.maximum(units, 1e-4 * units.max() + 1e-12).astype(np.float32)
    if fitted and not moments.n:
        note("train: no row counts any target, so the head starts without a fit")
    return Sample(units, _fit(moments, kept_out, eps) if moments.n else None)


def _rows(store: Store, rows: np.ndarray, seed: int, fitted: bool) -> Iterator[Weights]:
    """{name: [T, ...]} of rows of about _POSITIONS positions, states in float32."""
    states = ("aux_hidden", "last_hidden") if fitted else ("aux_hidden",)
    names = ("tokens", "segment_ids", "loss_mask", *arrays_of(store.features["precision"], *states))
    for row in _chosen(store, rows, seed):
        found = {name: x[0] for name, x in decode_states(store.read(names, [int(row)])).items()}
        yield found | {name: found[name].astype(np.float32) for name in states}


def _chosen(store: Store, rows: np.ndarray, seed: int) -> np.ndarray:
    """The rows of the sample, ascending; those without a counted target only where there are no others."""
    wanted = min(len(rows), -(-_POSITIONS // store.length))
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(rows)
    counted, empty = order[:0], order[:0]
    for start in range(0, len(order), wanted):
        part = order[start : start + wanted]
        masks = store.read(("segment_ids", "loss_mask"), part)
        counts = counted_targets(masks["segment_ids"], masks["loss_mask"]).any(1)
        counted, empty = np.append(counted, part[counts]), np.append(empty, part[~counts])
        if len(counted) >= wanted:
            break
    return np.sort(np.append(counted, empty)[:wanted])


def _features(
    found: Weights, aux: np.ndarray, embed_VH: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """(features [n, X], last hidden states [n, H]) of a row's counted targets, seen from the first step."""
    segments, by = found["segment_ids"], ahead(0)
    counted = counted_targets(segments[None], found["loss_mask"][None])[0]
    j = by + np.flatnonzero(counted[by:] & (segments[by:] == segments[:-by]))
    token = embed_VH[found["tokens"][j]].astype(np.float32)
    token /= np.sqrt((token**2).mean(1, keepdims=True) + eps)
    return np.concatenate([aux[j - by], token], 1), found["last_hidden"][j]


class _Moments:
    """Sums over samples: of the features' products [X, X], of theirs with the last state [X, H], of its
    squares [H]."""

    def __init__(self) -> None:
        self.n, self.gram_XX, self.cross_XH, self.square_H = 0, 0.0, 0.0, 0.0

    def add(self, features: np.ndarray, last: np.ndarray) -> None:
        self.n += len(last)
        self.gram_XX = self.gram_XX + (features.T @ features).astype(np.float64)
        self.cross_XH = self.cross_XH + (features.T @ last).astype(np.float64)
        self.square_H = self.square_H + np.square(last, dtype=np.float64).sum(0)


def _fit(moments: _Moments, kept_out: list[tuple[np.ndarray, np.ndarray]], eps: float) -> Fit:
    """A ridge regression to the last hidden state in units of its root mean square.

    A prediction varies less than what it predicts, but a norm makes it as large: at the last state's size a
    head would begin far too sure of itself. The ridge, and a factor for that size, are those that explain
    most of the rows that are kept out.
    """
    scale_H = np.sqrt(moments.square_H / moments.n) + 1e-6
    gram_XX = moments.gram_XX
    size_X = np.sqrt(np.diag(gram_XX)) + 1e-6  # every feature counts alike in the ridge
    gram_XX /= size_X[:, None] * size_X
    cross_XH = moments.cross_XH / (size_X[:, None] * scale_H)

    def tried(ridge: float) -> tuple[float, float, np.ndarray]:
        gram_XX[np.diag_indices(len(gram_XX))] = 1 + ridge
        map_XH = (np.linalg.solve(gram_XX, cross_XH) / size_X[:, None]).astype(np.float32)
        return *_judge(kept_out, map_XH, scale_H, eps), map_XH

    _, factor, map_XH = min(map(tried, _RIDGES), key=itemgetter(0))
    return Fit(map_XH, (factor * scale_H).astype(np.float32))


def _judge(
    samples: list[tuple[np.ndarray, np.ndarray]], map_XH: np.ndarray, scale_H: np.ndarray, eps: float
) -> tuple[float, float]:
    """(1 - R² of the map's normed predictions after the best rescaling, that rescaling)."""
    both = size = want = 0.0
    for features, last in samples:
        found, last = features @ map_XH, last / scale_H
        found /= np.sqrt(np.square(found).mean(1, keepdims=True) + eps)
        both += float((found * last).sum())
        size += float(np.square(found).sum())
        want += float(np.square(last).sum())
    if not size:
        return 0.0, 1.0
    return 1 - both**2 / (size * want), max(both / size, _LEAST_FACTOR)
