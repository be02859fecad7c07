"""What a head is told of its target before it trains: one pass over a sample of the store, on the chips.

**Units.** Some dimensions of a residual stream are thousands of times larger than others. Adam moves every
weight by about the learning rate, so those few would drown the rest: a matrix that reads the target's states
is trained as if each of its inputs had a root mean square of one (see train/optimizer.py).

**Fit.** The linear map of the states that the head reads at index i and of its token, to the target's last
hidden state at its target, which the target's lm_head turns into the teacher's logits. A random head spends
its first hundred thousand tokens on what this regression finds in seconds.

The sample depends on the store alone: heads of other seeds start from the same fit.

Dimensions: c chips, M targets of a chip, S states that the head reads, A = S * H, H hidden size, X = A + H
features.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common.errors import DamagedError
from common.layers import einsum
from common.mesh import spec, ways
from common.progress import Progress, note
from common.store import Store
from train import pieces, placing
from train.batch import Batch, Frozen, Inputs, embeddings, pick
from train.cholesky import solve
from train.order import listed, permutation
from train.stored import whole_teacher
from train.stream import Stream, View
from train.targets import drafting_index, valid_targets
from train.workload import Workload

_POSITIONS = 65_536  # for units, counted or not
# Targets for a fit. Of what the best linear map explains, 3 a feature keep 70 to 90%, 16 keep 94 to 98%: for
# states of 1,024 features with spectra of i^-0.5 to i^-1.5, half or four fifths of which can be explained.
_PER_FEATURE = 16
_MOST_POSITIONS = 2**19  # of which they are taken, at most
_KEPT_OUT = 8_192  # positions for choosing the ridge, but at most an eighth of the sample
_CHIP_POSITIONS = 2_048  # that a chip looks at at once
_RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the features' mean square
_SEED = 2**32  # of no run: its first rows would be those that are kept out
_NAMES = ("aux states", "states")  # of a head that does not read the last one, and of one that does
_LEAST_FACTOR = 0.1  # of the last state's size, should nothing be predictable

_CHIP, _ALL = spec(("chip",)), spec(())


class Fit(NamedTuple):
    """A prediction of the last hidden state: scale * (features @ map) / rms(features @ map).

    features @ map has a root mean square of one over the sample, whatever the ridge: its size is nothing to
    the prediction, but the smaller it is, the more of it each step of training changes.
    """

    map_XH: jax.Array
    scale_H: jax.Array
    aux_size: jax.Array  # []: the root mean square of what the states add to features @ map


class Sample(NamedTuple):
    """What a sample says, float32, whole on every chip."""

    units_A: jax.Array  # the root mean square of every input, over all of the documents; above 0
    fit: Fit | None  # where it is asked for, and anything counts


class _Moments(NamedTuple):
    """Sums over what each chip has seen, float32; the last four are of targets, None without a fit."""

    seen: jax.Array  # [c] positions of documents
    states: jax.Array  # [c, A] their squared states
    targets: jax.Array | None  # [c]
    gram: jax.Array | None  # [c, X, X] products of features
    cross: jax.Array | None  # [c, X, H] of features and last states
    square: jax.Array | None  # [c, H] squared last states


def empty(inputs: Inputs, hidden: int) -> Sample:
    """A sample without content, in whose place a saved state has what was made of it."""
    return Sample(jnp.ones(inputs.count * hidden, jnp.float32), None)


def measure(
    store: Store,
    mesh: Mesh,
    workload: Workload,
    rows: np.ndarray,
    embed_VH: jax.Array | None,
    eps: float,
    inputs: Inputs,
) -> Sample:
    """The sample's units, and its fit if there are embeddings, of rows that have the last state. The same
    store and rows give the same, within rounding on other chips. `inputs` are what the head reads.

    `eps` is added to mean squares of embeddings and predictions where they are normed. DamagedError for
    states that are not finite.
    """
    H = store.features["target"]["hidden_size"]
    A = inputs.count * H
    if embed_VH is not None:
        rows = rows[rows < store.rows_with("last_hidden")]
    teacher = whole_teacher(store) if embed_VH is None else "recompute"
    batches = partial(_batches, store, workload, mesh, inputs, teacher)
    chosen = _chosen(workload, rows, store.length, 0 if embed_VH is None else A + H)
    if embed_VH is not None and not workload.drafted[chosen].any():
        note("train: no row counts any target, so the head starts without a fit")
        embed_VH = None
    fitted = embed_VH is not None
    kept = chosen[: max(1, min(len(chosen) // 8, _KEPT_OUT // store.length))] if fitted else chosen[:0]
    seen = chosen[len(kept) :] if len(chosen) > 1 else chosen  # a single row is for both
    seen, kept = (_in_batches(some, store.length, mesh) for some in (seen, kept))
    kept_out = list(batches(kept)) if fitted else []
    features = partial(_features, inputs, eps)
    add = _adding(mesh, workload.ttt_steps, inputs, features)

    def summed(found: Iterable[Batch]) -> _Moments:
        moments = _zeros(mesh, A, H if fitted else 0)
        for batch in found:
            moments = add(moments, embed_VH, batch)
            progress.update(batch.tokens.size)
        return jax.jit(lambda x: jax.tree.map(lambda part: part.sum(0), x))(moments)

    with Progress("sample", (seen.size + kept.size) * store.length, "tok") as progress:
        total = summed(batches(seen))
        whole = jax.tree.map(jnp.add, total, summed(kept_out))
    units = jnp.sqrt(whole.states / jnp.maximum(whole.seen, 1))
    if not bool(jnp.isfinite(units).all()):
        raise DamagedError(
            f"{store.url}: {_NAMES[inputs.last]} of its rows are not finite, or their squares are not; no "
            "head can learn from them: dump them anew, in float32 or from a sound model"
        )
    units = jnp.maximum(units, 1e-4 * units.max() + 1e-12)
    if not fitted:
        return Sample(units, None)
    return Sample(units, _fit(mesh, workload.ttt_steps, eps, features, embed_VH, total, kept_out, whole))


def _chosen(workload: Workload, rows: np.ndarray, length: int, features: int) -> np.ndarray:
    """The rows of the sample; those without a target only where there are not enough others."""
    order = rows[permutation(len(rows), _SEED, 0)]
    targets = workload.drafted[order]
    order = np.concatenate([order[targets > 0], order[targets == 0]])
    enough = int(np.searchsorted(np.cumsum(workload.drafted[order]), _PER_FEATURE * features)) + 1
    return order[: max(-(-_POSITIONS // length), min(enough if features else 0, _MOST_POSITIONS // length))]


def _in_batches(rows: np.ndarray, length: int, mesh: Mesh) -> np.ndarray:
    """int64 [n, B]: the rows as the chips look at them, filled up with empty ones."""
    groups = ways(mesh, "batch")
    size = groups * max(1, min(_CHIP_POSITIONS // length, len(rows) // groups))
    filled = np.full(-(-len(rows) // size) * size, -1, np.int64)
    filled[: len(rows)] = rows
    return filled.reshape(-1, size)


def _batches(
    store: Store,
    workload: Workload,
    mesh: Mesh,
    inputs: Inputs,
    teacher: str,
    wanted: np.ndarray,
) -> Iterator[Batch]:
    capacity = workload.capacity(wanted, ways(mesh, "batch"))
    view = View(listed(wanted), workload, capacity, teacher, np.arange(0), inputs)
    return (batch for dealt in Stream(store, mesh, [view]).batches() for _, batch in dealt)


def _zeros(mesh: Mesh, inputs: int, hidden: int) -> _Moments:
    c, X = mesh.size, inputs + hidden
    shapes = [(c,), (c, inputs)] + ([(c,), (c, X, X), (c, X, hidden), (c, hidden)] if hidden else [])
    where = NamedSharding(mesh, _CHIP)
    found = jax.jit(lambda: [jnp.zeros(shape, jnp.float32) for shape in shapes], out_shardings=where)()
    return _Moments(*found, *[None] * (6 - len(found)))


def _adding(mesh: Mesh, steps: int, inputs: Inputs, features_of: Callable) -> Callable:
    """A function of (moments, embedding or None, batch) that adds the batch, each chip its own rows to its
    own sums."""

    def add(moments: _Moments, embed: jax.Array | None, batch: Batch) -> _Moments:
        inside = batch.segment_ids[:, : batch.aux_hidden.shape[1]] > 0
        inside = inside.reshape(-1).astype(jnp.float32)
        states = inputs.of(batch.aux_hidden, batch.last_hidden).astype(jnp.float32).reshape(inside.size, -1)
        new = _Moments(inside.sum(), (jnp.square(states) * inside[:, None]).sum(0), *[None] * 4)
        if embed is not None:
            features, last, there = features_of(embed, batch)
            products = (einsum("mx,my->xy", features, y) for y in (features, last))
            new = _Moments(*new[:2], there.sum(), *products, jnp.square(last).sum(0))
        return jax.tree.map(lambda total, part: total + part[None], moments, new)

    return jax.jit(_over_rows(mesh, steps, add, _CHIP, summed=False), donate_argnums=0)


def _over_rows(mesh: Mesh, steps: int, fn: Callable, first: Any, summed: bool) -> Callable:
    """`fn(first, embed, batch)` on every chip's own rows, of which a rollout of so many steps is to be
    known."""

    def on_chip(given: Any, embed: jax.Array | None, batch: Batch) -> Any:
        found = fn(given, embed, pieces.with_halo(batch, steps))
        return jax.lax.psum(found, _CHIP[0]) if summed else found

    def over_rows(given: Any, embed: jax.Array | None, batch: Batch) -> Any:
        columns = _ALL if embed is None else spec(placing.frozen_axes(Frozen(embed, None, embed), mesh).embed)
        own = jax.shard_map(
            on_chip,
            mesh=mesh,
            in_specs=(first, columns, placing.batch_specs(batch)),
            out_specs=_ALL if summed else _CHIP,
            check_vma=False,
        )
        return own(given, embed, batch)

    return over_rows


def _features(
    inputs: Inputs, eps: float, embed: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(features [M, X], last hidden states [M, H], whether there are any [M]) of a chip's targets, as they
    are seen from the first step; zeros where there are none."""
    n, there = batch.tokens.size, valid_targets(batch, 1)[:, 0]
    index, target = (
        jnp.where(there, at, n) for at in (drafting_index(batch.targets, 1)[:, 0], batch.targets)
    )

    def states(x: jax.Array, at: jax.Array) -> jax.Array:
        return pick(x, at).astype(jnp.float32).reshape(len(at), -1)

    token = embeddings(Frozen(embed, None, embed), batch)
    token = token.at[target].get(mode="fill", fill_value=0).astype(jnp.float32)
    token *= jax.lax.rsqrt(jnp.square(token).mean(1, keepdims=True) + eps)
    read = pieces.widened(inputs.of(batch.aux_hidden, batch.last_hidden), batch.tokens.shape[1])
    read, last = states(read, index), states(batch.last_hidden, target)
    return jnp.concatenate([read, token], 1), last, there.astype(jnp.float32)


def _fit(
    mesh: Mesh,
    steps: int,
    eps: float,
    features_of: Callable,
    embed: jax.Array,
    total: _Moments,
    kept_out: list[Batch],
    whole: _Moments,
) -> Fit | None:
    """A ridge regression to the last hidden state in units of its root mean square; None if there is none.

    A prediction varies less than what it predicts, but a norm makes it as large: at the last state's size a
    head would begin far too sure of itself. The ridge, and a factor for that size, are those that explain
    most of the rows that are kept out, by the others' `total`. The greater ridges are tried as long as they
    do better. The fit itself is that of the `whole`: where rows are few, each of them tells something.
    """
    judge = jax.jit(_over_rows(mesh, steps, partial(_explained, eps, features_of), _ALL, summed=True))
    everywhere = jax.shard_map(_solved, mesh=mesh, in_specs=(_ALL, _ALL), out_specs=_ALL, check_vma=False)
    solved = jax.jit(everywhere)
    least, ridge_is, factor = math.inf, None, 1.0
    for ridge in _RIDGES:
        map_XH, scale_H, _ = solved(total, jnp.float32(ridge))
        both, size, want = (float(x) for x in sum(judge((map_XH, scale_H), embed, b) for b in kept_out))
        unexplained = 1 - both**2 / (size * want) if size * want > 0 else math.inf
        if math.isnan(unexplained):  # more than rounding bears: a greater ridge
            continue
        if unexplained >= least:
            break
        least, ridge_is, factor = unexplained, ridge, max(both / size, _LEAST_FACTOR)
    if ridge_is is None:
        note("train: nothing can be told from the sample, so the head starts without a fit")
        return None
    map_XH, scale_H, aux_size = solved(whole, jnp.float32(ridge_is))
    return Fit(map_XH, factor * scale_H, aux_size)


def _solved(total: _Moments, ridge: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(map [X, H], the size of last states [H], that of the read states' part of the predictions) of every
    chip by itself."""
    scale_H = jnp.sqrt(total.square / total.targets) + 1e-6
    size_X = jnp.sqrt(jnp.diagonal(total.gram)) + 1e-6  # every feature counts alike in the ridge
    gram = total.gram / (size_X[:, None] * size_X[None])
    place = jnp.arange(len(size_X), dtype=jnp.int32)
    wanted = total.cross / (size_X[:, None] * scale_H[None])
    found = solve(gram.at[place, place].set(1 + ridge), wanted)
    # (gram + ridge) found = wanted, so the squares of all predictions need no product with gram.
    squares = (found * wanted).sum() - ridge * jnp.square(found).sum()
    count = total.targets * len(scale_H)
    map_XH = found / (size_X[:, None] * (jnp.sqrt(squares / count) + 1e-6))
    aux = len(map_XH) - len(scale_H)
    squares = einsum("xy,yh->xh", total.gram[:aux, :aux], map_XH[:aux]) * map_XH[:aux]
    return map_XH, scale_H, jnp.sqrt(squares.sum() / count) + 1e-6


def _explained(
    eps: float, features_of: Callable, fit: tuple[jax.Array, jax.Array], embed: jax.Array, batch: Batch
) -> jax.Array:
    """[3] sums over a chip's targets: normed predictions times last states, and the squares of both."""
    map_XH, scale_H = fit
    features, last, there = features_of(embed, batch)
    found, last = einsum("mx,xh->mh", features, map_XH), last / scale_H[None]
    found *= jax.lax.rsqrt(jnp.square(found).mean(1, keepdims=True) + eps)
    parts = (found * last, jnp.square(found), jnp.square(last))
    return jnp.stack([(x * there[:, None]).sum() for x in parts])
