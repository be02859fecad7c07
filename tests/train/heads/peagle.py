"""P-EAGLE (arXiv 2602.01469): all steps at once, those behind step 0 from a shared state and a mask token.

Which indices are trained how deep is drawn: of the targets, step k has the share anchors^k.

Dimensions: B sequences, m indices, n positions, C live indices, H hidden size, K steps.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from common.cached_attention import New
from common.config import setting
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

    stack: int = setting(2, "Layers.", least=1)
    mask: int = setting(1, "The token that stands for those not drafted yet.", least=0)


@dataclass(frozen=True)
class PEagle(Plain):
    """See train/heads/head.py: Head."""

    stack: int = 2
    mask: int = 1

    architecture: ClassVar[str] = "ToyPEagle"
    method: ClassVar[Method] = Method({"method": "eagle3", "parallel_drafting": True}, "EAGLE3")

    @property
    def depth(self):
        return self.stack

    def parameters(self):
        H = self.hidden_size
        norm, matrix = Param((H,), (None,), "ones"), (None, None)
        found = {"enorm": norm, "hnorm": norm, "shared": Param((H,), (None,), "ones")}
        found |= {"fc": Param((H, len(self.aux_layers) * H), matrix), "join": Param((H, 2 * H), matrix)}
        return found | self.layer_parameters() | self.own_parameters()

    def units(self, sample):
        return {"fc": sample.units_A}

    def start(self, noise, sample, lm_head_DH, key):
        fc = noise["fc"] / sample.units_A[None]
        return super().start(noise, sample, lm_head_DH, key) | {"fc": fc}

    def shares(self, anchors, steps):
        return tuple(anchors**k for k in range(steps))

    def _joined(self, w, embedded_mH, state_mH):
        both = (embedded_mH, w["enorm"]), (state_mH, w["hnorm"])
        return linear(jnp.concatenate([rms_norm(*x, self.rms_eps) for x in both], 1), w["join"])

    def rollout(self, params, frozen, batch, steps, dtype):
        n, w = batch.tokens.size, self.ready(params, dtype)
        aux = batch.aux_hidden.astype(dtype)
        state = linear(aux.reshape(*aux.shape[:2], -1), w["fc"])
        state_nH = pieces.widened(state, batch.tokens.shape[1]).reshape(n, -1)
        known = live.ahead_by(jnp.int32(1), embeddings(frozen, batch).astype(dtype))
        mask = embeddings(frozen, batch, jnp.array([self.mask], jnp.int32)).astype(dtype)
        later = self._joined(w, mask, w["shared"].astype(dtype)[None])
        parts = by_steps(batch, steps)
        places = [live.places(part, which.stop, self.turns) for which, part in parts]
        count = [len(part.live) for _, part in parts]
        x_nH, turned = self._joined(w, known, state_nH), self.turns(batch.positions)
        x = [
            {k: jnp.broadcast_to(later, (C, later.shape[1])) for k in which if k}
            for (which, _), C in zip(parts, count, strict=True)
        ]
        for number in range(self.stack):
            layer = self.layer(w, number)
            made = self.keys_values(layer, x_nH, turned)
            first = live.first_keys(places[0], made, self.head_dim)
            own = []  # keys and values of steps so far, of the live indices
            for part, (at, states) in enumerate(zip(places, x, strict=True)):
                if part:
                    own = [jax.tree.map(partial(_moved, places[part - 1], at), one) for one in own]
                own = own or [
                    jax.tree.map(lambda y, C=count[part]: jnp.zeros((C, y.shape[1]), y.dtype), made)
                ]
                own = own + [self.keys_values(layer, states[k], at.turns_at(k)) for k in states]
                seen = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
                for k in states:
                    read = partial(live.read, at, jnp.int32(k), first, seen)
                    states[k] = self.block(layer, states[k], at.turns_at(k), read)
            x_nH = self.block(layer, x_nH, turned, partial(live.read_first, places[0], first))
        found = []
        for (which, _), at, states in zip(parts, places, x, strict=True):
            of = {0: live.of_live(at, x_nH)} | states
            found.append(rms_norm(jnp.stack([of[k] for k in which]), w["norm"], self.rms_eps))
        return found

    def begin(self, ready, states_BmSH):
        return linear(states_BmSH.reshape(*states_BmSH.shape[:2], -1), ready["fc"])

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        H = self.hidden_size
        x = self._joined(ready, embedded_BmH.reshape(-1, H), state_BmH.reshape(-1, H))
        hidden, cache = self._through(ready, cache, x, new)
        return state_BmH, hidden.reshape(state_BmH.shape), cache

    def _through(self, w, cache, x_mH, new):
        turned = self.turns(new.positions_Bm)
        for number in range(self.stack):
            layer = self.layer(w, number)
            cache = cached.written(cache, number, new, self.keys_values(layer, x_mH, turned))
            x_mH = self.block(layer, x_mH, turned, partial(cached.read, cache, number, new))
        return rms_norm(x_mH, w["norm"], self.rms_eps), cache

    def at_once(self, ready, cache, left, starts_B, steps, embed_VH):
        first_BH = left[1]
        if steps == 1:
            return first_BH[:, None]
        dtype = first_BH.dtype
        later = self._joined(
            ready, embed_VH[self.mask][None].astype(dtype), ready["shared"].astype(dtype)[None]
        )
        B = len(starts_B)
        x = jnp.broadcast_to(later, (B * (steps - 1), later.shape[1]))
        hidden, _ = self._through(ready, cache, x, New.behind(starts_B, steps - 1))
        return jnp.concatenate([first_BH[:, None], hidden.reshape(B, steps - 1, -1)], 1)


def _moved(there, here, x_C):
    """What is of the live indices of an earlier part, of those of a later one."""
    return live.of_live(here, live.everywhere(there, x_C))
