"""DFlash (arXiv 2602.06036): a block of a known token and masks, at once, each of which sees all of the block
and keys made of the target's states.

Nothing of an index is another one's: a share of the targets is trained, at all steps.

Dimensions: B sequences, m indices, n positions, C live indices, H hidden size, K steps, S slots of a block.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from common.cached_attention import New, Tree
from common.config import setting
from common.errors import EyasError
from common.layers import linear, rms_norm
from common.params import Param
from tests.train.heads.plain import Plain
from train import pieces
from train.batch import by_steps, embeddings
from train.heads import cached, live
from train.launch import Method


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be chosen about it."""

    masks: int = setting(4, "Masks of a block.", least=1)
    mask_token: int = setting(1, "What a mask is to the embedding.", least=0)


@dataclass(frozen=True)
class DFlash(Plain):
    """See train/heads/head.py: Head."""

    masks: int = 4
    mask_token: int = 1

    architecture: ClassVar[str] = "ToyDFlash"
    method: ClassVar[Method] = Method({"method": "dflash"}, "DFLASH")
    depth: ClassVar[int] = 2

    def parameters(self):
        H = self.hidden_size
        found = {
            "fc": Param((H, len(self.aux_layers) * H), (None, None)),
            "hnorm": Param((H,), (None,), "ones"),
        }
        return found | self.layer_parameters() | self.own_parameters()

    def units(self, sample):
        return {"fc": sample.units_A}

    def start(self, noise, sample, lm_head_DH, key):
        fc = noise["fc"] / sample.units_A[None]
        return super().start(noise, sample, lm_head_DH, key) | {"fc": fc}

    def shares(self, anchors, steps):
        return (anchors,) * steps

    def require_steps(self, steps, where):
        if steps > self.masks:
            raise EyasError(f"{where} drafts {self.masks} tokens at most, and not {steps}; give fewer")

    def _injected(self, layer, state_mH, turns_BmR):
        """Keys and values of the target's states."""
        made = self.turned(linear(state_mH, layer["k"]), turns_BmR).reshape(len(state_mH), -1)
        return made, linear(state_mH, layer["v"])

    def rollout(self, params, frozen, batch, steps, dtype):
        n, w, S = batch.tokens.size, self.ready(params, dtype), self.masks + 1
        aux = batch.aux_hidden.astype(dtype)
        state = rms_norm(linear(aux.reshape(*aux.shape[:2], -1), w["fc"]), w["hnorm"], self.rms_eps)
        state_nH = pieces.widened(state, batch.tokens.shape[1]).reshape(n, -1)
        ((which, part),) = by_steps(batch, steps)
        at, turned = live.places(part, S + 1, self.turns), self.turns(batch.positions)
        known = live.of_tokens(at, jnp.int32(0), embeddings(frozen, batch).astype(dtype))
        mask = embeddings(frozen, batch, jnp.array([self.mask_token], jnp.int32)).astype(dtype)
        x = [known, *[jnp.broadcast_to(mask, known.shape)] * self.masks]
        for number in range(self.depth):
            layer = self.layer(w, number)
            first = live.first_keys(at, self._injected(layer, state_nH, turned), self.head_dim)
            made = [self.keys_values(layer, x[s], at.turns_at(s + 1)) for s in range(S)]
            own = jax.tree.map(lambda *xs: jnp.stack([xs[0], *xs]), *made)  # what is in front is not seen
            read = partial(live.read, at, jnp.int32(S), first, own)
            x = [self.block(layer, x[s], at.turns_at(s + 1), read) for s in range(S)]
        return [rms_norm(jnp.stack([x[1 + k] for k in which]), w["norm"], self.rms_eps)]

    def empty_cache(self, sequences, length, dtype):
        return super().empty_cache(sequences, length + self.masks, dtype)

    def begin(self, ready, states_BmSH):
        states = linear(states_BmSH.reshape(*states_BmSH.shape[:2], -1), ready["fc"])
        return rms_norm(states, ready["hnorm"], self.rms_eps)

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        turned = self.turns(new.positions_Bm)
        for number in range(self.depth):
            made = self._injected(self.layer(ready, number), state_BmH.reshape(-1, self.hidden_size), turned)
            cache = cached.written(cache, number, new, made)
        return embedded_BmH, embedded_BmH, cache

    def at_once(self, ready, cache, left, starts_B, steps, embed_VH):
        (B, H), S = left[0].shape, self.masks + 1
        mask = jnp.broadcast_to(embed_VH[self.mask_token].astype(left[0].dtype), (B, self.masks, H))
        x = jnp.concatenate([left[0][:, None], mask], 1).reshape(B * S, H)
        depths_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        tree = Tree(starts_B, depths_BS, jnp.ones((B, S, S), bool))
        new = New.behind(starts_B, S)._replace(tree=tree)
        turned = self.turns(new.positions_Bm)
        for number in range(self.depth):
            layer = self.layer(ready, number)
            cache = cached.written(cache, number, new, self.keys_values(layer, x, turned))
            x = self.block(layer, x, turned, partial(cached.read, cache, number, new))
        return rms_norm(x, ready["norm"], self.rms_eps).reshape(B, S, H)[:, 1 : steps + 1]
