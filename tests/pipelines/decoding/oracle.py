"""Heads that are told what the target will say: kinds of their own behind the protocol."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pipelines.decoding.drafting import Drafter, Drafting
from train.batch import Inputs


@dataclass(frozen=True)
class _Told:
    """What both have: states as wide as the vocabulary, at which nobody looks."""

    vocab_size: int
    aux_layers: tuple[int, ...]

    @property
    def inputs(self):
        return Inputs(self.aux_layers)

    @property
    def hidden_size(self):
        return self.vocab_size

    def begin(self, ready, states_BmSH):
        return jnp.zeros((*states_BmSH.shape[:2], self.vocab_size))

    def at_once(self, ready, cache, left, starts_B, steps, embed_VH):
        return None


@dataclass(frozen=True)
class Oracle(_Told):
    """`rank` of a position: how many other tokens it holds likelier than the right one there, by turns.

    Its cache is the text of each slot, which a test writes into it.
    """

    slots: tuple[tuple[int, ...], ...]  # the texts
    ranks: tuple[int, ...]

    def empty_cache(self, sequences, length, dtype):
        texts = np.zeros((1, sequences, length + 2), np.int32)
        for slot, text in enumerate(self.slots):
            texts[0, slot, : len(text)] = text[: length + 2]
        return {"text": jnp.asarray(texts)}

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        at = jnp.minimum(new.positions_Bm + 2, cache["text"].shape[2] - 1)
        right = jnp.take_along_axis(cache["text"][0], at, 1)
        rank = jnp.asarray(self.ranks, jnp.int32)[at % len(self.ranks)]
        vocabulary = jnp.arange(self.vocab_size, dtype=jnp.int32)[None, None]
        behind = (vocabulary - right[..., None]) % self.vocab_size
        # The right token's logit is 0; those of the `rank` tokens behind it in the vocabulary are above.
        far = behind.astype(jnp.float32)
        logits = jnp.where(behind <= rank[..., None], 0.2 * far, -9.0 - far / self.vocab_size)
        return state_BmH, logits, cache


class Known(NamedTuple):
    """`logits` [K, V, V]: of what follows each token, as the k-th one drafted comes to stand behind it."""

    embed_VH: Any
    logits_KVV: Any


@dataclass(frozen=True)
class Informed(_Told):
    """Knows `Known` of one prompt, behind whose last token, at `index`, it drafts."""

    index: int

    def empty_cache(self, sequences, length, dtype):
        return {"nothing": jnp.zeros((1, sequences, 1))}

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        token_Bm = (embedded_BmH[..., None, :] == ready.embed_VH[None, None]).all(-1).argmax(-1)
        k_Bm = jnp.clip(new.positions_Bm - self.index, 0, len(ready.logits_KVV) - 1)
        return state_BmH, ready.logits_KVV[k_Bm, token_Bm], cache


def informed(known: Known, index: int, ids, aux_layers, **how) -> tuple[Drafting, Drafter]:
    """As an engine takes it; it drafts the tokens `ids`."""
    V = len(known.embed_VH)
    return Drafting(Informed(V, aux_layers, index), **how), Drafter(known, jnp.eye(V)[ids], ids)


def drafting(head: Oracle, **how) -> tuple[Drafting, Drafter]:
    """For an engine; the draft vocabulary is the whole one."""
    V = head.vocab_size
    return Drafting(head, **how), Drafter((), jnp.eye(V), jnp.arange(V, dtype=jnp.int32))
