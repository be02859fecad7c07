"""The sizes of an EAGLE3 head: a transformer block between the target's hidden states and a draft vocabulary.

Parameters are named and laid out as the servers' checkpoints have them: linear weights are [out, in].
Source: EAGLE-3 (arXiv 2503.01840) and SafeAILab/EAGLE `eagle/model/cnets.py`.

Dimensions: H hidden size, A aux states, F feed-forward width, D draft vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

from common.errors import EyasError
from common.params import Declaration, Param

_LATENT_HEAD_DIM, _LATENT_KV_HEADS = 128, 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of a head. `aux_layers` are in h_k terms: h_k is the residual stream that enters layer k."""

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

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn", "draft_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
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
    target: dict[str, Any], draft_vocab_size: int, aux_layers: tuple[int, ...], ffn: int | None
) -> dict[str, Any]:
    """The sizes that fit a target: a Llama block of the target's sizes. `target` is its text's config.json.

    A target with latent attention has no heads that a Llama block could have: the head's are 128 wide. Its
    YaRN scaling with `mscale` is left out, because servers read that of a Llama block in another way. Where
    the number of heads does not divide the hidden size (GLM-4.7: 96 and 5,120) the head has fewer, because
    transformers, by which servers read its config.json, refuses such a Llama.
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
    kv_heads = math.gcd(heads, kv_heads)
    head_dim += head_dim % 2  # odd where the target rotates a part of it
    rope, theta = _rope(target)
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
    )


def _rope(target: dict[str, Any]) -> tuple[dict[str, Any] | None, float]:
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
    """Every trained parameter; the embedding is the target's and frozen."""
    H, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = "midlayer"
    norm = Param((H,), (None,), "ones")
    return {
        "fc.weight": Param((H, len(c.aux_layers) * c.target_hidden_size), (None, None)),
        f"{layer}.hidden_norm.weight": norm,
        f"{layer}.input_layernorm.weight": norm,
        f"{layer}.self_attn.q_proj.weight": Param((q, 2 * H), (None, None)),
        f"{layer}.self_attn.k_proj.weight": Param((kv, 2 * H), (None, None)),
        f"{layer}.self_attn.v_proj.weight": Param((kv, 2 * H), (None, None)),
        f"{layer}.self_attn.o_proj.weight": Param((H, q), (None, None)),
        f"{layer}.post_attention_layernorm.weight": norm,
        f"{layer}.mlp.gate_proj.weight": Param((c.ffn, H), (None, None)),
        f"{layer}.mlp.up_proj.weight": Param((c.ffn, H), (None, None)),
        f"{layer}.mlp.down_proj.weight": Param((H, c.ffn), (None, None)),
        "norm.weight": norm,
        "lm_head.weight": Param((c.draft_vocab_size, H), (None, None)),
    }


def matrices(c: Sizes) -> frozenset[str]:
    """The block's and `fc`, but not the output: a gradient of logits has a row for every token."""
    return frozenset(name for name, p in parameters(c).items() if len(p.shape) == 2) - {"lm_head.weight"}
