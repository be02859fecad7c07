"""The programs of an engine: a prompt is read, and answers go on.

Without a head a step gives one token. With one, the head drafts, the target reads the draft in one pass, and
what it accepts is given, with a token of its own behind; then the head reads these tokens with the target's
states, and leaves what the next draft begins with. All are pure, of static shapes.

Dimensions: B slots, T tokens of a prompt, n nodes of a draft, d tokens a step at most, A aux states, S states
that the head reads, H hidden size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.cached_attention import New
from dump import target
from dump.target import decoding
from pipelines.decoding.accepting import Given, accept, follow
from pipelines.decoding.drafting import Draft, Drafter, Drafting, Last, draft, undrafted
from pipelines.decoding.sampling import Sampling, choose


class How(NamedTuple):
    """What does not change. `drafting` None: without a head."""

    cfg: target.TargetConfig
    sampling: Sampling
    drafting: Drafting | None

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Those that the head reads."""
        return self.drafting.head.inputs.aux_layers if self.drafting else ()


class Weights(NamedTuple):
    """The target's, and what the head drafts with."""

    target: dict[str, jax.Array]
    drafter: Drafter | None


class Held(NamedTuple):
    """What steps leave to each other: the target's cache; the head's, and the states that it left."""

    target: decoding.Cache
    head: Any = None
    state_BH: jax.Array | None = None
    hidden_BH: jax.Array | None = None


def nothing(how: How, slots: int, length: int, dtype: Any) -> Held:
    """Before the first prompt. EyasError for a tree on a target that cannot read one."""
    d = how.drafting
    if d is None:
        return Held(decoding.empty_cache(how.cfg, slots, length, dtype))
    if d.topk > 1:
        decoding.require_trees(how.cfg)
    room = length if d.topk == 1 else length + d.nodes  # a tree has more places than positions
    cache = decoding.empty_cache(how.cfg, slots, room, dtype, d.steps + 1)
    states = jnp.zeros((2, slots, d.head.hidden_size), dtype)
    return Held(cache, d.head.empty_cache(slots, length + d.places, dtype), *states)


def prefill(
    how: How, w: Weights, held: Held, tokens_1T: Any, length_1: Any, slot_1: Any, seed_1: Any
) -> tuple[jax.Array, Held]:
    """(the first token [1] of an answer, what is held) of a prompt that begins in a slot."""
    of_prompt = tokens_1T, length_1, slot_1, how.aux_layers
    aux_1TAH, last_1TH, cache = decoding.prefill(how.cfg, w.target, held.target, *of_prompt)
    ends_11 = length_1[:, None] - 1
    last_1H = jnp.take_along_axis(last_1TH, ends_11[..., None], 1)[:, 0]
    logits_1V = target.logits(how.cfg, w.target, last_1H)
    token_1 = choose(how.sampling, logits_1V, seed_1, jnp.zeros_like(seed_1))
    if how.drafting is None:
        return token_1, Held(cache)
    numbers_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None]
    next_1T = jnp.where(numbers_1T == ends_11, token_1[:, None], jnp.roll(tokens_1T, -1, 1))
    own = jax.tree.map(lambda x: x[:, slot_1], held.head)
    states = how.drafting.head.inputs.of(aux_1TAH, last_1TH)
    own, *left = _read(how.drafting, w, own, next_1T, states, jnp.zeros_like(length_1), length_1)
    head = jax.tree.map(lambda x, own: x.at[:, slot_1].set(own), held.head, own)
    left = (x.at[slot_1].set(y) for x, y in zip((held.state_BH, held.hidden_BH), left, strict=True))
    return token_1, Held(cache, head, *left)


def step(
    how: How, w: Weights, held: Held, tokens_B: Any, starts_B: Any, seeds_B: Any, numbers_B: Any
) -> tuple[Given, Held]:
    """(what comes next in all slots, what is held): `tokens` are their last ones, at positions `starts`, and
    the next ones have these numbers in their answers."""
    d, drafted, head, tree = how.drafting, undrafted(tokens_B), None, None
    if d is not None:
        last = Last(tokens_B, starts_B, seeds_B, numbers_B, held.state_BH, held.hidden_BH)
        drafted, head = draft(d, how.sampling, w.drafter, w.target["embed_tokens"], held.head, last)
        tree = drafted.tree(starts_B, d.steps) if d.topk > 1 else None
    behind = drafted.tokens_Bn, starts_B, how.aux_layers, tree
    aux_BnAH, last_BnH, cache = decoding.step(how.cfg, w.target, held.target, *behind)
    given = _given(how, w, drafted, target.logits(how.cfg, w.target, last_BnH), seeds_B, numbers_B)
    if d is None:
        return given, Held(cache)
    if tree is not None:
        cache = decoding.keep(cache, starts_B, given.nodes_Bd)
    states = jnp.take_along_axis(d.head.inputs.of(aux_BnAH, last_BnH), given.nodes_Bd[..., None, None], 1)
    return given, Held(cache, *_read(d, w, head, given.tokens_Bd, states, starts_B, given.counts_B))


def _given(how: How, w: Weights, drafted: Draft, logits_BnV, seeds_B, numbers_B) -> Given:
    if drafted.logits_BkD is not None:
        return accept(how.sampling, drafted, w.drafter.ids_D, logits_BnV, seeds_B, numbers_B)
    steps = how.drafting.steps if how.drafting else 0
    return follow(how.sampling, drafted, steps, logits_BnV, seeds_B, numbers_B)


def _read(d: Drafting, w: Weights, cache: Any, tokens_BT, states_BTSH, starts_B, counts_B) -> tuple[Any, ...]:
    """The head's cache behind indices from `starts` on whose next tokens are `tokens`, and the states [B, H]
    that it leaves at the last one of `counts`."""
    state = d.head.begin(w.drafter.ready, states_BTSH)
    embedded = w.target["embed_tokens"][tokens_BT].astype(state.dtype)
    new = New.behind(starts_B, tokens_BT.shape[1])
    *states, cache = d.head.step(w.drafter.ready, cache, embedded, state, new)
    ends_B11 = counts_B[:, None, None] - 1
    return cache, *(jnp.take_along_axis(x, ends_B11, 1)[:, 0] for x in states)
