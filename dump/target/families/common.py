"""Pieces that the families' descriptions share."""

from collections.abc import Callable, Sequence

from common.errors import EyasError
from dump.target.complete import complete
from dump.target.dense import ACTIVATIONS, Dense
from dump.target.fields import Fields
from dump.target.gqa import Gqa
from dump.target.moe import GatedExperts, Moe
from dump.target.routing import Router
from dump.target.spec import Layer, Norm, Rope, TargetConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def described(
    model_type: str, describe: Callable[[Fields], TargetConfig]
) -> Callable[[Fields], TargetConfig]:
    """A family: its config.json, completed by transformers' class of `model_type`, and then described."""

    def read(f: Fields) -> TargetConfig:
        complete(f, model_type)
        return describe(f)

    return read


def norm(f: Fields, offset: float = 0.0) -> Norm:
    """The family's RMS norm."""
    return Norm(float(f.get("rms_norm_eps")), offset)


def gqa(
    f: Fields,
    bias: bool = False,
    out_bias: bool = False,
    head_norm: Norm | None = None,
    rope: Rope | None = None,
) -> Gqa:
    """Full attention as most families write it; `rope` where the family's rotation is not the usual one."""
    hidden, heads = f.get("hidden_size"), f.get("num_attention_heads")
    kv_heads = f.get("num_key_value_heads", heads)
    head_dim = f.get("head_dim", max(hidden // heads, 1))
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


def activation(f: Fields, name: str = "hidden_act") -> str:
    """The feed-forward activation; EyasError if it is not implemented."""
    return f.only(name, *ACTIVATIONS)


def dense(f: Fields, bias: bool = False, activation_field: str = "hidden_act") -> Dense:
    """The gated feed-forward part."""
    return Dense(f.get("hidden_size"), f.get("intermediate_size"), activation(f, activation_field), bias)


def gated_experts(f: Fields, ffn: str = "moe_intermediate_size") -> GatedExperts:
    """Experts whose matrices are tensors of their own."""
    return GatedExperts(f.get("hidden_size"), f.get(ffn), activation(f))


def layer_types(f: Fields, *known: str, name: str = "layer_types") -> list[str]:
    """One kind a layer; EyasError for a kind that is not among `known` or for another number of them."""
    kinds, n = f.get(name), f.get("num_hidden_layers")
    for kind in kinds:
        if kind not in known:
            raise EyasError(f"{f.where}: {name} has {kind!r}; supported: {', '.join(known)}")
    if len(kinds) != n:
        raise EyasError(f"{f.where}: {name} has {len(kinds)} entries for {n} layers; make them equal")
    return kinds


def model(f: Fields, layers: Sequence[Layer], **more) -> TargetConfig:
    """The whole target."""
    for layer in set(layers):
        if isinstance(layer.feed_forward, Moe):
            _check_router(f, layer.feed_forward.router)
    if f.dynamic_limit:
        reason = "dynamic RoPE scaling changes with the length beyond max_position_embeddings"
        more = {"max_length": f.dynamic_limit, "max_length_reason": reason} | more
    return TargetConfig(
        architecture=f.get("architectures")[0],
        hidden_size=f.get("hidden_size"),
        vocab_size=f.get("vocab_size"),
        layers=tuple(layers),
        norm=layers[0].norm,
        raw=f.found,
        text=f.raw,
        **({"tied": f.get("tie_word_embeddings")} | more),
    )


def _check_router(f: Fields, router: Router) -> None:
    """EyasError if it could not choose as many experts as it shall."""
    each, rest = divmod(router.experts, router.groups)
    open_ = each * min(router.groups_kept, router.groups)
    if rest or router.top_k > open_ or (router.groups > 1 and router.group_best > each):
        raise EyasError(
            f"{f.where}: {router.top_k} experts a token cannot be chosen from {router.experts} in "
            f"{router.groups} groups, {router.groups_kept} of them open; correct the one that is wrong"
        )
