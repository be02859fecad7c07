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

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from common.errors import DamagedError
from common.fit_size import fit_rows
from common.layers import einsum
from common.mesh import ways
from common.progress import Progress, note
from common.store import Store
from train.batch import Batch, Inputs
from train.fit import CHIP, Fit, Moments, features, fit, over_rows
from train.order import listed, permutation
from train.stored import whole_teacher
from train.stream import Stream, View
from train.workload import Workload

_POSITIONS = 65_536  # for units, counted or not
_KEPT_OUT = 8_192  # positions for choosing the ridge, but at most an eighth of the sample
_CHIP_POSITIONS = 2_048  # that a chip looks at at once
_SEED = 2**32  # of no run: its first rows would be those that are kept out
_NAMES = ("aux states", "states")  # of a head that does not read the last one, and of one that does


class Sample(NamedTuple):
    """What a sample says, float32, whole on every chip."""

    units_A: jax.Array  # the root mean square of every input, over all of the documents; above 0
    fit: Fit | None  # where it is asked for, and anything counts


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
    seen_by = partial(features, inputs, eps)
    add = _adding(mesh, workload.ttt_steps, inputs, seen_by)

    def summed(found: Iterable[Batch]) -> Moments:
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
    return Sample(units, fit(mesh, workload.ttt_steps, eps, seen_by, embed_VH, total, kept_out, whole))


def _chosen(workload: Workload, rows: np.ndarray, length: int, features: int) -> np.ndarray:
    """The rows of the sample; those without a target only where there are not enough others."""
    order = rows[permutation(len(rows), _SEED, 0)]
    targets = workload.drafted[order]
    order = np.concatenate([order[targets > 0], order[targets == 0]])
    wanted = fit_rows(workload.drafted[order], length, features) if features else 0
    return order[: max(-(-_POSITIONS // length), wanted)]


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


def _zeros(mesh: Mesh, inputs: int, hidden: int) -> Moments:
    c, X = mesh.size, inputs + hidden
    shapes = [(c,), (c, inputs)] + ([(c,), (c, X, X), (c, X, hidden), (c, hidden)] if hidden else [])
    where = NamedSharding(mesh, CHIP)
    found = jax.jit(lambda: [jnp.zeros(shape, jnp.float32) for shape in shapes], out_shardings=where)()
    return Moments(*found, *[None] * (6 - len(found)))


def _adding(mesh: Mesh, steps: int, inputs: Inputs, features_of: Callable) -> Callable:
    """A function of (moments, embedding or None, batch) that adds the batch, each chip its own rows to its
    own sums."""

    def add(moments: Moments, embed: jax.Array | None, batch: Batch) -> Moments:
        inside = batch.segment_ids[:, : batch.aux_hidden.shape[1]] > 0
        inside = inside.reshape(-1).astype(jnp.float32)
        states = inputs.of(batch.aux_hidden, batch.last_hidden).astype(jnp.float32).reshape(inside.size, -1)
        new = Moments(inside.sum(), (jnp.square(states) * inside[:, None]).sum(0), *[None] * 4)
        if embed is not None:
            x, last, there = features_of(embed, batch)
            products = (einsum("mx,my->xy", x, y) for y in (x, last))
            new = Moments(*new[:2], there.sum(), *products, jnp.square(last).sum(0))
        return jax.tree.map(lambda total, part: total + part[None], moments, new)

    return jax.jit(over_rows(mesh, steps, add, CHIP, summed=False), donate_argnums=0)
