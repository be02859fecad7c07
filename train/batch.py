"""What a training step is given: one shard of rows, and what of the target stays as it is.

Dimensions: B rows, T positions, n = B * T, A aux states, H hidden size, C live indices, M targets, V the
target's vocabulary, D the draft's, k of the likeliest that are kept. Of rows in pieces (train/pieces.py) T is
what a chip has of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from common.mesh import RULES

AXIS = "chip"  # over which the head's weights, and the frozen ones, lie divided; see common/mesh.py
Params = dict[str, jax.Array]


class Inputs(NamedTuple):
    """The target's states that a head reads at an index: those that enter its layers `aux_layers`, then the
    last one if `last`."""

    aux_layers: tuple[int, ...]
    last: bool = False

    @property
    def count(self) -> int:
        """S, how many they are."""
        return len(self.aux_layers) + self.last

    def of(self, aux_BTAH: jax.Array, last_BTH: jax.Array | None) -> jax.Array:
        """[B, t, S, H], of the positions that have aux states, as exact as they are."""
        if not self.last:
            return aux_BTAH
        assert last_BTH is not None
        last_Bt1H = last_BTH[:, : aux_BTAH.shape[1], None]
        if not self.aux_layers:
            return last_Bt1H
        dtype = jnp.promote_types(aux_BTAH.dtype, last_Bt1H.dtype)
        return jnp.concatenate([aux_BTAH.astype(dtype), last_Bt1H.astype(dtype)], 2)


class Batch(NamedTuple):
    """One shard's rows, decoded, and which of their positions count (see train/targets.py)."""

    tokens: jax.Array  # int32 [B, T]
    segment_ids: jax.Array  # int32 [B, T]; 0 is padding
    positions: jax.Array  # int32 [B, T]
    aux_hidden: jax.Array  # [B, T, A, H]; [B, t, A, H] of a piece, whose own positions are t of T
    last_hidden: jax.Array | None  # [B, T, H]; None where it neither teaches nor is read
    draft_logprobs: jax.Array | None  # [B, T, D], over the target's whole vocabulary
    argmax: jax.Array  # int32 [B, T], target ids
    logsumexp: jax.Array | None  # float32 [B, T]; of last_hidden's logits
    live: jax.Array  # int32 [C], flat indices; n where free; where C is n, all positions
    targets: jax.Array  # int32 [M], flat positions; n where free
    count: jax.Array  # int32 [1], how many targets are real; so many as there are parts, see `in_parts`
    topk_logprobs: jax.Array | None = None  # [B, T, k], of the likeliest tokens
    topk_ids: jax.Array | None = None  # int32 [B, T, k], target ids
    row: jax.Array | None = None  # int32 [B], of the store
    samples: dict[int, Params] | None = None  # {k: live, targets and count from step k on}, where they differ
    draws: jax.Array | None = None  # uint32 [B, 2], a row's key for random numbers; None in scoring


class Frozen(NamedTuple):
    """What the head takes from the target and never trains."""

    embed: jax.Array  # [V, H]; a chip's part of the columns where they are divided
    lm_head: jax.Array | None  # [D, H], the draft vocabulary's rows; None where it is not to teach
    draft_index: jax.Array  # int32 [V]: a token's place in the draft vocabulary, or -1


def in_parts(batch: Batch) -> Batch:
    """A shard's parts [P, ...], each of which is a batch: its live indices and targets are those of its own
    rows."""
    count = len(batch.count)
    return jax.tree.map(lambda x: x.reshape(count, len(x) // count, *x.shape[1:]), batch)


def by_steps(batch: Batch, steps: int) -> list[tuple[range, Batch]]:
    """What is computed of a batch at which steps: the same at all, or samples from some steps on. An index
    that is live at a step is live at all before it."""
    parts = {0: {}} | (batch.samples or {})
    ends = [*list(parts)[1:], steps]
    found = [(range(first, end), part) for (first, part), end in zip(parts.items(), ends, strict=True)]
    return [(which, batch._replace(**part, samples=None)) for which, part in found]


def pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T, ...] at flat positions `at`, zeros where that is a free place."""
    return x.reshape(-1, *x.shape[2:]).at[at].get(mode="fill", fill_value=0)


def embeddings(frozen: Frozen, batch: Batch, tokens_n: jax.Array | None = None) -> jax.Array:
    """The embeddings of a shard's tokens, [n, H], or of any others, as many on each chip.

    Where a chip has some of the columns (inside a shard_map), it looks them up for the tokens of all chips,
    and each gets the other columns of its own tokens from the others.
    """
    tokens_n = batch.tokens.reshape(-1) if tokens_n is None else tokens_n
    if frozen.embed.shape[1] == batch.aux_hidden.shape[-1]:
        return frozen.embed[tokens_n]
    parts = frozen.embed[jax.lax.all_gather(tokens_n, RULES[AXIS], tiled=True)]
    return jax.lax.all_to_all(parts, RULES[AXIS], split_axis=0, concat_axis=1, tiled=True)
