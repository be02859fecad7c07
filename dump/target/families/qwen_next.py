"""Qwen3-Next: three gated DeltaNet layers, then one of gated attention; many experts and a shared one.

Behaviour: transformers `models/qwen3_next`.
"""

from dataclasses import replace

from dump.target.deltanet import DeltaNet
from dump.target.dense import Dense
from dump.target.families.common import FULL, activation, dense, gated_experts, gqa, layer_types, model, norm
from dump.target.families.qwen_moe import is_sparse, softmax_router
from dump.target.fields import Fields
from dump.target.moe import Moe
from dump.target.spec import Layer, TargetConfig

_LINEAR = "linear_attention"


def _delta_net(f: Fields) -> DeltaNet:
    return DeltaNet(
        hidden=f.size("hidden_size"),
        key_heads=f.size("linear_num_key_heads"),
        value_heads=f.size("linear_num_value_heads"),
        key_dim=f.size("linear_key_head_dim"),
        value_dim=f.size("linear_value_head_dim"),
        kernel=f.size("linear_conv_kernel_dim", 4),
        eps=norm(f).eps,
    )


def _qwen3_next(f: Fields) -> TargetConfig:
    f.defaults(partial_rotary_factor=0.25, norm_topk_prob=True)
    norms, bias = norm(f, offset=1.0), bool(f.get("attention_bias", False))
    attention = replace(gqa(f, bias, bias, norms), gated=True)
    shared = Dense(
        f.size("hidden_size"),
        f.size("shared_expert_intermediate_size"),
        activation(f),
        module="mlp.shared_expert",
    )
    sparse = Moe(softmax_router(f), gated_experts(f), shared, shared_gate=True)
    n, interval = f.size("num_hidden_layers"), f.size("full_attention_interval", 4)
    kinds = layer_types(f, [_LINEAR if (i + 1) % interval else FULL for i in range(n)])
    mixers = {FULL: attention, _LINEAR: _delta_net(f)}
    has_experts, plain = is_sparse(f), dense(f)
    layers = [
        Layer(mixers[kind], sparse if has_experts(i) else plain, norms, f.size("hidden_size"))
        for i, kind in enumerate(kinds)
    ]
    return model(f, layers, surplus=(r"^mtp\.",))


ARCHITECTURES = {"Qwen3NextForCausalLM": _qwen3_next}
