"""A ridge regression from what a head reads at first to the target's last hidden state, on the chips.

Dimensions: c chips, M targets of a chip, S states that the head reads, A = S * H, H hidden size, X = A + H
features.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.layers import einsum
from common.mesh import spec
from common.progress import note
from train import pieces, placing
from train.batch import Batch, Frozen, Inputs, embeddings, pick
from train.cholesky import solve
from train.targets import drafting_index, valid_targets

_RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of the features' mean square
_LEAST_FACTOR = 0.1  # of the last state's size, should nothing be predictable

CHIP, ALL = spec(("chip",)), spec(())


class Fit(NamedTuple):
    """A prediction of the last hidden state: scale * (features @ map) / rms(features @ map).

    features @ map has a root mean square of one over the sample, whatever the ridge: its size is nothing to
    the prediction, but the smaller it is, the more of it each step of training changes.
    """

    map_XH: jax.Array
    scale_H: jax.Array
    aux_size: jax.Array  # []: the root mean square of what the states add to features @ map


class Moments(NamedTuple):
    """Sums over what each chip has seen, float32; the last four are of targets, None without a fit."""

    seen: jax.Array  # [c] positions of documents
    states: jax.Array  # [c, A] their squared states
    targets: jax.Array | None  # [c]
    gram: jax.Array | None  # [c, X, X] products of features
    cross: jax.Array | None  # [c, X, H] of features and last states
    square: jax.Array | None  # [c, H] squared last states


def over_rows(mesh: Mesh, steps: int, fn: Callable, first: Any, summed: bool) -> Callable:
    """`fn(first, embed, batch)` on every chip's own rows, of which a rollout of so many steps is to be
    known."""

    def on_chip(given: Any, embed: jax.Array | None, batch: Batch) -> Any:
        found = fn(given, embed, pieces.with_halo(batch, steps))
        return jax.lax.psum(found, CHIP[0]) if summed else found

    def on_rows(given: Any, embed: jax.Array | None, batch: Batch) -> Any:
        columns = ALL if embed is None else spec(placing.frozen_axes(Frozen(embed, None, embed), mesh).embed)
        own = jax.shard_map(
            on_chip,
            mesh=mesh,
            in_specs=(first, columns, placing.batch_specs(batch)),
            out_specs=ALL if summed else CHIP,
            check_vma=False,
        )
        return own(given, embed, batch)

    return on_rows


def features(
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


def fit(
    mesh: Mesh,
    steps: int,
    eps: float,
    features_of: Callable,
    embed: jax.Array,
    total: Moments,
    kept_out: list[Batch],
    whole: Moments,
) -> Fit | None:
    """A ridge regression to the last hidden state in units of its root mean square; None if there is none.

    A prediction varies less than what it predicts, but a norm makes it as large: at the last state's size a
    head would begin far too sure of itself. The ridge, and a factor for that size, are those that explain
    most of the rows that are kept out, by the others' `total`. The greater ridges are tried as long as they
    do better. The fit itself is that of the `whole`: where rows are few, each of them tells something.
    """
    judge = jax.jit(over_rows(mesh, steps, partial(_explained, eps, features_of), ALL, summed=True))
    everywhere = jax.shard_map(_solved, mesh=mesh, in_specs=(ALL, ALL), out_specs=ALL, check_vma=False)
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


def _solved(total: Moments, ridge: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
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
