"""Medusa (arXiv 2401.10774), a head that is nothing like EAGLE3: a block for each step reads the target's
last hidden state, and all tokens are drafted at once.

It stands here to show that a kind of head is its package: what it has of the protocol is all that it has.

Dimensions: B sequences, m indices, n positions, C live indices, H hidden size, K steps.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field

from common import schema
from common.config import setting
from common.errors import EyasError
from common.layers import linear
from common.params import Param
from train.anchors import behind_first
from train.batch import Inputs, by_steps
from train.config import TrainConfig
from train.heads import KINDS
from train.heads.head import HEADS
from train.launch import Method
from train.servers import PORTABLE

_KEYS = ("hidden_size", "vocab_size", "draft_vocab_size", "blocks", "dropout")


class _Fields(schema.TypedDict):
    """Of its config.json."""

    hidden_size: schema.Size
    vocab_size: schema.Size
    draft_vocab_size: schema.Size
    blocks: Annotated[int, Field(ge=1, le=64)]
    dropout: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What can be chosen about it."""

    blocks: int = setting(2, "Steps with a block of their own.", least=1)
    dropout: float = setting(0.0, "Share of the state's values that are left out in training.", below=1)


@dataclass(frozen=True)
class Config(TrainConfig, Settings):
    """As if the kind stood in train/heads."""

    kind: str = setting("medusa", "Kind of the head.", choices=("eagle3", "medusa"))


def register(monkeypatch):
    """The lines of the two tables."""
    monkeypatch.setitem(KINDS, "medusa", Settings)
    monkeypatch.setitem(HEADS, "medusa", Medusa)


@dataclass(frozen=True)
class Medusa:
    """Step k's logits are lm_head (h + silu(W_k h)); behind the last block its own is used again."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    blocks: int
    dropout: float = 0.0
    rms_eps: float = 1e-6

    method: ClassVar[Method] = Method({"method": "medusa"}, "MEDUSA")
    layouts: ClassVar[tuple[str, ...]] = (PORTABLE,)
    variants: ClassVar[dict[str, Any]] = {}
    draft_vocab: ClassVar[int | None] = None
    inputs: ClassVar[Inputs] = Inputs((), last=True)
    rows_of: ClassVar[str] = "lm_head"

    @classmethod
    def for_target(cls, target, draft_vocab_size, aux_layers, **settings):
        return cls(target["hidden_size"], target["vocab_size"], draft_vocab_size, **settings)

    @classmethod
    def layout_of(cls, config):
        return PORTABLE if cls.is_published(config) else None

    @classmethod
    def is_published(cls, config):
        return config.get("architectures") == ["MedusaModel"]

    @classmethod
    def from_serving_config(cls, path, config, num_target_layers):
        schema.check(_Fields, config, path, "export the head again")
        return cls(**{name: config[name] for name in _KEYS})

    from_published = from_serving_config

    def asked(self, settings, where):
        for name, value in settings.items():
            if value != getattr(self, name):
                raise EyasError(f"{where} has {name}={getattr(self, name)}; leave {name} out")
        return self

    def sources(self, found, path):
        return {name: name for name in self.parameters()}

    def parameters(self):
        H, D = self.hidden_size, self.draft_vocab_size
        blocks = {f"blocks.{k}.weight": Param((H, H), (None, None), "zeros") for k in range(self.blocks)}
        return blocks | {"lm_head.weight": Param((D, H), (None, None))}

    def still(self):
        return frozenset()

    def matrices(self):
        return frozenset(self.parameters()) - {"lm_head.weight"}

    def units(self, sample):
        return {name: sample.units_A for name in self.matrices()}

    def start(self, noise, sample, lm_head_DH, key):
        return noise if lm_head_DH is None else noise | {"lm_head.weight": lm_head_DH.astype(jnp.float32)}

    def _all(self, params, state_XH, steps):
        """[K, ..., H] of so many steps."""
        found = []
        for k in steps:
            w = params[f"blocks.{min(k, self.blocks - 1)}.weight"].astype(state_XH.dtype)
            found.append(state_XH + jax.nn.silu(linear(state_XH, w)))
        return jnp.stack(found)

    def rollout(self, params, frozen, batch, steps, dtype):
        state_BtH = self.inputs.of(batch.aux_hidden, batch.last_hidden)[:, :, 0].astype(dtype)
        if self.dropout and batch.draws is not None:
            keys = jax.random.wrap_key_data(batch.draws)
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, state_BtH.shape[1:]))(
                keys
            )
            state_BtH = jnp.where(kept, state_BtH / (1 - self.dropout), 0)
        state_nH = state_BtH.reshape(-1, self.hidden_size)
        return [
            self._all(params, state_nH.at[part.live].get(mode="fill", fill_value=0), which)
            for which, part in by_steps(batch, steps)
        ]

    def output(self, params):
        return params["lm_head.weight"]

    def ready(self, params, dtype):
        return {name: x.astype(dtype) for name, x in params.items()}

    def empty_cache(self, sequences, length, dtype):
        return {}

    def begin(self, ready, states_BmSH):
        return states_BmSH[:, :, 0]

    def step(self, ready, cache, embedded_BmH, state_BmH, new):
        return state_BmH, state_BmH, cache

    def at_once(self, ready, cache, left, starts_B, steps, embed_VH):
        return self._all(ready, left[0], range(steps)).swapaxes(0, 1)

    def tensors(self, layout):
        return {name: name for name in self.parameters()}

    def beside(self, layout):
        N, V = self.draft_vocab_size, self.vocab_size
        return {"d2t": Param((N,), (None,)), "t2d": Param((V,), (None,))} if N < V else {}

    def serving_config(self, target, dtype, layout=PORTABLE, verifier=""):
        sizes = {name: getattr(self, name) for name in _KEYS}
        return {"architectures": ["MedusaModel"], "torch_dtype": dtype} | sizes

    def card(self, metadata, target, layout):
        return f"# Medusa for {metadata.get('target')}\n"

    def facts(self):
        return [f"blocks: {self.blocks}"]

    def limits(self, target):
        return []

    def require_fit(self, target, where):
        for name in ("hidden_size", "vocab_size"):
            if getattr(self, name) != target[name]:
                raise EyasError(f"{where} has {name} {getattr(self, name)}, its target {target[name]}")

    def shares(self, anchors, steps):
        return behind_first(anchors, steps)

    def require_steps(self, steps, where):
        pass

    def require_pieces(self, pieces, where):
        pass
