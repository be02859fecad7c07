"""What the toy kinds of heads beside it have in common: transformer layers without anything special.

Dimensions: H hidden size, N query heads, J key/value heads, d head_dim, m indices, R = d / 2.
"""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, get_type_hints

import jax
import jax.numpy as jnp
from pydantic import Field

from common import schema
from common.errors import EyasError
from common.layers import apply_rope, linear, rms_norm, rope_tables
from common.params import Param
from common.rope import inverse_frequencies
from train.anchors import behind_first
from train.batch import Inputs
from train.heads import cached
from train.servers import PORTABLE

NORM = {"in", "post"}
_HELD = {  # by a config.json: what may stand in a field of a type
    int: Annotated[int, Field(ge=0, le=2**16)],
    float: Annotated[float, Field(gt=0)],
    bool: bool,
    tuple[int, ...]: list[int],
}
_LAYER = ("in", "q", "k", "v", "o", "post", "gate", "up", "down")


@dataclass(frozen=True)
class Plain:
    """The boring half of the protocol."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    rms_eps: float
    theta: float
    aux_layers: tuple[int, ...] = ()

    layouts: ClassVar[tuple[str, ...]] = (PORTABLE,)
    variants: ClassVar[dict[str, Any]] = {}
    draft_vocab: ClassVar[int | None] = None
    rows_of: ClassVar[str] = "lm_head"
    architecture: ClassVar[str]

    @classmethod
    def for_target(cls, target, draft_vocab_size, aux_layers, **settings):
        sizes = {
            "heads": target["num_attention_heads"],
            "kv_heads": target["num_key_value_heads"],
            "head_dim": target.get("head_dim") or target["hidden_size"] // target["num_attention_heads"],
            "ffn": target["intermediate_size"],
            "rms_eps": target["rms_norm_eps"],
            "theta": 1e4,
        }
        head = cls(target["hidden_size"], target["vocab_size"], draft_vocab_size, **sizes, **settings)
        return head.reading(tuple(aux_layers))

    @property
    def inputs(self):
        return Inputs(self.aux_layers)

    def reading(self, aux_layers):
        return replace(self, aux_layers=aux_layers)

    @classmethod
    def layout_of(cls, config):
        return PORTABLE if config.get("architectures") == [cls.architecture] else None

    @classmethod
    def is_published(cls, config):
        return cls.layout_of(config) is not None

    @classmethod
    def from_serving_config(cls, path, config, num_target_layers):
        kinds = get_type_hints(cls)
        held = {field.name: _HELD[kinds[field.name]] for field in fields(cls)}
        schema.check(schema.TypedDict(cls.__name__, held), config, path, "export the head again")
        found = {name: config[name] for name in held}
        return cls(**found | {"aux_layers": tuple(found["aux_layers"])})

    @classmethod
    def from_published(cls, path, config, num_target_layers):
        return cls.from_serving_config(path, config, num_target_layers)

    def asked(self, settings, where):
        for name, value in settings.items():
            if value != getattr(self, name):
                raise EyasError(f"{where} has {name}={getattr(self, name)}; leave {name} out")
        return self

    def sources(self, found, path):
        return {name: name for name in self.parameters()}

    def still(self):
        return frozenset({"lm_head"})

    def matrices(self):
        return frozenset(name for name, p in self.parameters().items() if len(p.shape) == 2) - {"lm_head"}

    def units(self, sample):
        return {}

    def start(self, noise, sample, lm_head_DH, key):
        return noise | {"lm_head": lm_head_DH.astype(jnp.float32)}

    def output(self, params):
        return params["lm_head"]

    def shares(self, anchors, steps):
        return behind_first(anchors, steps)

    def ready(self, params, dtype):
        return {name: x.astype(dtype) if x.ndim > 1 else x for name, x in params.items()}

    def tensors(self, layout):
        return {name: name for name in self.parameters()}

    def beside(self, layout):
        N, V = self.draft_vocab_size, self.vocab_size
        return {"d2t": Param((N,), (None,)), "t2d": Param((V,), (None,))} if N < V else {}

    def serving_config(self, target, dtype, layout=PORTABLE, verifier=""):
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"architectures": [self.architecture], "torch_dtype": dtype} | sizes

    def card(self, metadata, target, layout):
        return f"# {self.architecture} for {metadata.get('target')}\n"

    def facts(self):
        return []

    def limits(self, target):
        return []

    def require_fit(self, target, where):
        if self.hidden_size != target["hidden_size"]:
            raise EyasError(f"{where} has hidden_size {self.hidden_size}, its target {target['hidden_size']}")

    def require_pieces(self, pieces, where):
        if self.heads % pieces or self.kv_heads % pieces:
            raise EyasError(f"{where} has {self.heads} heads; give another --sp than {pieces}")

    def require_steps(self, steps, where):
        pass

    def empty_cache(self, sequences, length, dtype):
        return cached.empty(self.depth, sequences, length, self.kv_heads, self.head_dim, dtype)

    def at_once(self, ready, cache, left, starts_B, steps, embed_VH):
        return None

    def own_parameters(self):
        """Those of a norm and of the output, which all have."""
        H = self.hidden_size
        return {
            "norm": Param((H,), (None,), "ones"),
            "lm_head": Param((self.draft_vocab_size, H), (None, None)),
        }

    def layer_parameters(self):
        H, q, kv, F = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.ffn
        shapes = [(H,), (q, H), (kv, H), (kv, H), (H, q), (H,), (F, H), (F, H), (H, F)]
        return {
            f"layers.{number}.{name}": Param(shape, (None,) * len(shape), *["ones"] * (name in NORM))
            for number in range(self.depth)
            for name, shape in zip(_LAYER, shapes, strict=True)
        }

    def layer(self, w, number):
        return {name: w[f"layers.{number}.{name}"] for name in _LAYER}

    def turns(self, positions):
        return rope_tables(positions, jnp.asarray(inverse_frequencies(self.head_dim, self.theta, None)[0]))

    def keys_values(self, w, x_mH, turns_BmR):
        """[m, J * d] each."""
        normed = rms_norm(x_mH, w["in"], self.rms_eps)
        return self.turned(linear(normed, w["k"]), turns_BmR).reshape(len(x_mH), -1), linear(normed, w["v"])

    def turned(self, x_mY, turns_BmR):
        tables = tuple(jax.lax.stop_gradient(x) for x in turns_BmR)
        return apply_rope(x_mY.reshape(*tables[0].shape[:2], -1, self.head_dim), tables)

    def block(self, w, x_mH, turns_BmR, read):
        """[m, H] behind a layer whose queries [B, m, N, d] `read`."""
        q = self.turned(linear(rms_norm(x_mH, w["in"], self.rms_eps), w["q"]), turns_BmR)
        x_mH = x_mH + linear(read(q).reshape(len(x_mH), -1), w["o"])
        normed = rms_norm(x_mH, w["post"], self.rms_eps)
        return x_mH + linear(jax.nn.silu(linear(normed, w["gate"])) * linear(normed, w["up"]), w["down"])
