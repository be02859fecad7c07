"""Pieces that the families' descriptions share."""

from collections.abc import Sequence

from common.errors import EyasError
from dump.target.dense import ACTIVATIONS, Dense
from dump.target.fields import Fields
from dump.target.gqa import Gqa
from dump.target.moe import GatedExperts
from dump.target.spec import Layer, Norm, Rope, TargetConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def norm(f: Fields, offset: float = 0.0) -> Norm:
    """The family's RMS norm."""
    return Norm(float(f.get("rms_norm_eps", 1e-6)), offset)


def gqa(
    f: Fields,
    bias: bool = False,
    out_bias: bool = False,
    head_norm: Norm | None = None,
    rope: Rope | None = None,
) -> Gqa:
    """Full attention as most families write it; `rope` where the family's fields are not the usual ones."""
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    kv_heads = f.size("num_key_value_heads", heads)
    head_dim = f.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise EyasError(
            f"{f.where}: num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
        )
    return Gqa(
        hidden,
        heads,
        kv_heads,
        head_dim,
        rope or f.rope(head_dim),
        head_dim**-0.5,
        None,
        bias,
        out_bias,
        head_norm,
    )


def activation(f: Fields, name: str = "hidden_act", default: str = "silu") -> str:
    """The feed-forward activation; EyasError if it is not implemented."""
    return f.only(name, tuple(ACTIVATIONS), default)


def dense(f: Fields, bias: bool = False, activation_field: str = "hidden_act") -> Dense:
    """The gated feed-forward part."""
    return Dense(f.size("hidden_size"), f.size("intermediate_size"), activation(f, activation_field), bias)


def gated_experts(f: Fields, ffn: str = "moe_intermediate_size") -> GatedExperts:
    """Experts whose matrices are tensors of their own."""
    return GatedExperts(f.size("hidden_size"), f.size(ffn), activation(f))


def layer_types(f: Fields, default: Sequence[str]) -> list[str]:
    """One kind a layer: `layer_types`, or what the older fields mean."""
    kinds = list(f.get("layer_types", list(default)))
    if len(kinds) != f.size("num_hidden_layers"):
        raise EyasError(
            f"{f.where}: layer_types has {len(kinds)} entries for {f.size('num_hidden_layers')} layers"
        )
    return kinds


def model(f: Fields, layers: Sequence[Layer], **more) -> TargetConfig:
    """The whole target."""
    if f.dynamic_limit:
        reason = "dynamic RoPE scaling changes with the length beyond max_position_embeddings"
        more = {"max_length": f.dynamic_limit, "max_length_reason": reason} | more
    return TargetConfig(
        architecture=f.raw["architectures"][0],
        hidden_size=f.size("hidden_size"),
        vocab_size=f.size("vocab_size"),
        layers=tuple(layers),
        norm=layers[0].norm,
        raw=f.original,
        text=f.raw,
        **({"tied": bool(f.get("tie_word_embeddings", False))} | more),
    )
