"""The sizes of an EAGLE3 head: transformer layers between the target's hidden states and a draft vocabulary.

Parameters are named and laid out as the servers' checkpoints have them: linear weights are [out, in].
Sources: EAGLE-3 (arXiv 2503.01840) and SafeAILab/EAGLE `eagle/model/cnets.py`; EAGLE-3.1 (arXiv 2605.09992)
for `fc_norm` and `norm_output`; vLLM `models/llama_eagle3.py` for `norm_before_residual` and several layers.

Dimensions: H hidden size, A aux states, F feed-forward width, D draft vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

from common.errors import EyasError
from common.params import Declaration, Param
from train.heads.eagle3.settings import MOST_LAYERS

METHOD = "eagle3"  # what servers call it
_COUNTS = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn", "draft_vocab_size", "layers")
_LATENT_HEAD_DIM, _LATENT_KV_HEADS = 128, 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of a head. `aux_layers` are in h_k terms: h_k is the residual stream that enters layer k.

    The first of `layers` takes embedding and state beside each other, later ones are plain Llama layers.
    `fc_norm`: each aux state is normed before `fc`. `norm_output`: the next step takes the state behind the
    final norm, not before it. `norm_before_residual`: what the first layer adds to is the normed state.
    `lm_head` is trained ("own"), or stays as the target's lm_head ("frozen") or embedding ("tied") has it.
    """

    hidden_size: int
    target_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    draft_vocab_size: int
    vocab_size: int
    rms_eps: float
    rope_theta: float
    rope: dict[str, Any] | None
    max_position: int
    aux_layers: tuple[int, ...]
    num_target_layers: int
    layers: int = 1
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    lm_head: str = "own"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers={self.layers} must be at most {MOST_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head serves a whole group of heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE turns pairs of dimensions")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size={self.draft_vocab_size} exceeds the target's vocab_size={self.vocab_size}"
            )
        if self.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"hidden_size={self.hidden_size} must equal target_hidden_size={self.target_hidden_size}: "
                "the head takes the target's frozen embeddings"
            )


def for_target(
    target: dict[str, Any],
    draft_vocab_size: int,
    aux_layers: tuple[int, ...],
    ffn: int | None = None,
    num_kv_heads: int | None = None,
    **variant: Any,
) -> dict[str, Any]:
    """The sizes that fit a target: a Llama block of the target's sizes. `target` is its text's config.json,
    `variant` the fields of `Sizes` that have a default.

    A target with latent attention has no heads that a Llama block could have: the head's are 128 wide. Its
    YaRN scaling with `mscale` is left out, because servers read that of a Llama block in another way. Where
    the number of heads does not divide the hidden size (GLM-4.7: 96 and 5,120) the head has fewer, because
    transformers, by which servers read its config.json, refuses such a Llama. EyasError where they are no
    multiple of the `num_kv_heads` that are asked for.
    """
    for field in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if field not in target:
            raise EyasError(f"the store's target/config.json has no {field}; dump the store again")
    hidden, heads = target["hidden_size"], target["num_attention_heads"]
    kv_heads, head_dim = target.get("num_key_value_heads") or heads, target.get("head_dim") or hidden // heads
    if target.get("kv_lora_rank"):
        head_dim = min(_LATENT_HEAD_DIM, hidden)
        heads, kv_heads = hidden // head_dim, _LATENT_KV_HEADS
    heads = math.gcd(hidden, heads)
    kv_heads = num_kv_heads or math.gcd(heads, kv_heads)
    if heads % kv_heads:
        known = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise EyasError(
            f"num_kv_heads={kv_heads}, but the head has {heads} heads for this target, and each of keys and "
            f"values serves as many of them; give one of {known}"
        )
    head_dim += head_dim % 2  # odd where the target rotates a part of it
    rope, theta = rope_of(target)
    return dict(
        hidden_size=hidden,
        target_hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn or target["intermediate_size"],
        draft_vocab_size=draft_vocab_size,
        vocab_size=target["vocab_size"],
        rms_eps=target.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        max_position=target.get("max_position_embeddings", 2048),
        aux_layers=tuple(aux_layers),
        num_target_layers=target["num_hidden_layers"],
        **variant,
    )


def rope_of(target: dict[str, Any]) -> tuple[dict[str, Any] | None, float]:
    """(scaling or None, theta), from the new or the old fields; of the global layers where there are two.

    The head rotates all of its dimensions, also where the target rotates a part of its own.
    """
    new = target.get("rope_parameters") or {}
    rope = dict(new.get("full_attention") or new or target.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or target.get("rope_theta") or 10000.0
    rope.pop("partial_rotary_factor", None)
    plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    return None if plain or "mscale" in rope else rope, float(theta)


def parameters(c: Sizes) -> Declaration:
    """Every parameter; the embedding is the target's and frozen."""
    H, norm = c.hidden_size, Param((c.hidden_size,), (None,), "ones")
    aux = Param((c.target_hidden_size,), (None,), "ones")
    found = {"fc.weight": Param((H, len(c.aux_layers) * c.target_hidden_size), (None, None))}
    if c.fc_norm:
        found |= {f"fc_norm.{number}.weight": aux for number in range(len(c.aux_layers))}
    found |= {"midlayer.hidden_norm.weight": norm} | _layer(c, layer_name(0), 2 * H)
    for number in range(1, c.layers):
        found |= _layer(c, layer_name(number), H)
    return found | {"norm.weight": norm, "lm_head.weight": Param((c.draft_vocab_size, H), (None, None))}


def layer_name(number: int) -> str:
    """What the names of a layer's parameters begin with."""
    return f"layers.{number}" if number else "midlayer"


def _layer(c: Sizes, name: str, inputs: int) -> Declaration:
    H, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    norm = Param((H,), (None,), "ones")
    return {
        f"{name}.input_layernorm.weight": norm,
        f"{name}.self_attn.q_proj.weight": Param((q, inputs), (None, None)),
        f"{name}.self_attn.k_proj.weight": Param((kv, inputs), (None, None)),
        f"{name}.self_attn.v_proj.weight": Param((kv, inputs), (None, None)),
        f"{name}.self_attn.o_proj.weight": Param((H, q), (None, None)),
        f"{name}.post_attention_layernorm.weight": norm,
        f"{name}.mlp.gate_proj.weight": Param((c.ffn, H), (None, None)),
        f"{name}.mlp.up_proj.weight": Param((c.ffn, H), (None, None)),
        f"{name}.mlp.down_proj.weight": Param((H, c.ffn), (None, None)),
    }


def matrices(c: Sizes) -> frozenset[str]:
    """The layers' and `fc`, but not the output: a gradient of logits has a row for every token."""
    return frozenset(name for name, p in parameters(c).items() if len(p.shape) == 2) - {"lm_head.weight"}


def still(c: Sizes) -> frozenset[str]:
    """The parameters that are not trained."""
    return frozenset() if c.lm_head == "own" else frozenset({"lm_head.weight"})


def require_pieces(c: Sizes, pieces: int, where: str) -> None:
    """EyasError unless so many chips can share the heads evenly, those of keys and values several times where
    there are too few."""

    def fits(chips: int) -> bool:
        return c.num_heads % math.lcm(c.num_kv_heads, chips) == 0

    if not fits(pieces):
        known = ", ".join(str(chips) for chips in range(1, c.num_heads + 1) if fits(chips))
        raise EyasError(
            f"{where} has {c.num_heads} attention heads and {c.num_kv_heads} of keys and values, which "
            f"sp={pieces} chips can't share evenly; give an --sp of {known}"
        )
