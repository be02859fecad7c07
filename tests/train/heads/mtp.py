"""MTP (DeepSeek-V3, arXiv 2412.19437), as targets bring it along: the last hidden state and the next token's
embedding, joined, enter one layer; the output is the target's.

Dimensions: B sequences, m indices, n positions, C live indices, H hidden size, K steps.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp

from common.attention import KEPT
from common.config import setting
from common.errors import EyasError
from common.layers import linear, rms_norm
from common.params import Param
from tests.train.heads.plain import Plain
from train import pieces
from train.batch import Inputs, by_steps, embeddings
from train.heads import cached, live
from train.heads.ttt import Step, rolled
from train.launch import Method
from train.targets import ahead

_OF_TARGET = {  # what a target calls the parameters, in the layer behind its last one
    "enorm": "enorm",
    "hnorm": "hnorm",
    "join": "eh_proj",
    "norm": "shared_head.norm",
    "layers.0.in": "input_layernorm",
    "layers.0.post": "post_attention_layernorm",
    **{f"layers.0.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{f"layers.0.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be chosen about it."""

    hidden_first: bool = setting(False, "Join the state before the embedding.")


@dataclass(frozen=True)
class Mtp(Plain):
    """See train/heads/head.py: Head."""

    hidden_first: bool = False

    architecture: ClassVar[str] = "ToyMTP"
    method: ClassVar[Method] = Method({"method": "mtp"}, "NEXTN")
    inputs: ClassVar[Inputs] = Inputs((), last=True)
    depth: ClassVar[int] = 1

    def reading(self, aux_layers):
        return self

    @classmethod
    def is_published(cls, config):
        return super().is_published(config) or bool(config.get("num_nextn_predict_layers"))

    @classmethod
    def from_published(cls, path, config, num_target_layers):
        if not cls.layout_of(config):
            return cls.for_target(config, config["vocab_size"], ())
        return super().from_published(path, config, num_target_layers)

    def sources(self, found, path):
        joined = [name for name in found if re.fullmatch(r"model\.layers\.\d+\.eh_proj\.weight", name)]
        if not joined:
            return super().sources(found, path)
        place = joined[0].removesuffix("eh_proj.weight")
        its = {name: f"{place}{known}.weight" for name, known in _OF_TARGET.items()}
        its["lm_head"] = "lm_head.weight" if "lm_head.weight" in found else "model.embed_tokens.weight"
        for name in its.values():
            if name not in found:
                raise EyasError(f"{path} lacks {name}")
        return its

    def parameters(self):
        H = self.hidden_size
        norm, join = Param((H,), (None,), "ones"), Param((H, 2 * H), (None, None))
        return {"enorm": norm, "hnorm": norm, "join": join} | self.layer_parameters() | self.own_parameters()

    def halves(self, w):
        """Of the matrix that joins them: the embedding's and the state's."""
        halves = jnp.split(w["join"], 2, 1)
        return halves[::-1] if self.hidden_first else halves

    def rollout(self, params, frozen, batch, steps, dtype):
        n, w = batch.tokens.size, self.ready(params, dtype)
        last = self.inputs.of(batch.aux_hidden, batch.last_hidden)[:, :, 0].astype(dtype)
        state_nH = pieces.widened(last, batch.tokens.shape[1]).reshape(n, -1)
        embedded = rms_norm(embeddings(frozen, batch).astype(dtype), w["enorm"], self.rms_eps)
        token_nH = linear(embedded, self.halves(w)[0])
        parts = by_steps(batch, steps)
        places = [live.places(part, which.stop, self.turns) for which, part in parts]
        layer = self.layer(w, 0)
        x_nH = self._joined(w, live.ahead_by(ahead(jnp.int32(0)), token_nH), state_nH)
        first = self.keys_values(layer, x_nH, self.turns(batch.positions))
        shared = {"w": w, "token": token_nH, "first": live.first_keys(places[0], first, self.head_dim)}
        found, ttt = [], Step(self._make, self._advance, (KEPT,))
        for (which, _), at in zip(parts, places, strict=True):
            states = rolled(ttt, which, at, shared, live.of_live(at, state_nH))
            state_nH = live.everywhere(at, states[-1])
            found.append(rms_norm(states, w["norm"], self.rms_eps))
        return found

    def _joined(self, w, token_mH, state_mH):
        return token_mH + linear(rms_norm(state_mH, w["hnorm"], self.rms_eps), self.halves(w)[1])

    def _make(self, at, k, shared, state_CH):
        x = self._joined(shared["w"], live.of_tokens(at, k, shared["token"]), state_CH)
        return self.keys_values(self.layer(shared["w"], 0), x, at.turns_at(k))

    def _advance(self, at, k, shared, state_CH, own):
        x = self._joined(shared["w"], live.of_tokens(at, k, shared["token"]), state_CH)
        read = partial(live.read, at, k, shared["first"], own)
        return self.block(self.layer(shared["w"], 0), x, at.turns_at(k), read)

    def begin(self, ready, states_BmSH):
        return states_BmSH[:, :, 0]

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        H, turned, layer = self.hidden_size, self.turns(new.positions_Bm), self.layer(ready, 0)
        token = linear(
            rms_norm(embedded_BmH.reshape(-1, H), ready["enorm"], self.rms_eps), self.halves(ready)[0]
        )
        x = self._joined(ready, token, state_BmH.reshape(-1, H))
        cache = cached.written(cache, 0, new, self.keys_values(layer, x, turned))
        state = self.block(layer, x, turned, partial(cached.read, cache, 0, new))
        hidden = rms_norm(state, ready["norm"], self.rms_eps)
        return state.reshape(state_BmH.shape), hidden.reshape(state_BmH.shape), cache
