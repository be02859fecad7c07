"""Qwen3-Next: three gated DeltaNet layers, then one of gated attention; many experts and a shared one.

Behaviour: transformers `models/qwen3_next`.
"""

from dataclasses import replace

from common.errors import EyasError
from dump.target.deltanet import DeltaNet
from dump.target.dense import Dense
from dump.target.families.common import (
    FULL,
    activation,
    dense,
    described,
    gated_experts,
    gqa,
    layer_types,
    model,
    norm,
)
from dump.target.families.qwen_moe import is_sparse, softmax_router
from dump.target.fields import Fields
from dump.target.moe import Moe
from dump.target.spec import Layer, TargetConfig

_LINEAR = "linear_attention"


def _delta_net(f: Fields) -> DeltaNet:
    keys, values = f.get("linear_num_key_heads"), f.get("linear_num_value_heads")
    if values % keys:
        raise EyasError(
            f"{f.where}: linear_num_value_heads={values} is no multiple of linear_num_key_heads={keys}"
        )
    return DeltaNet(
        hidden=f.get("hidden_size"),
        key_heads=f.get("linear_num_key_heads"),
        value_heads=f.get("linear_num_value_heads"),
        key_dim=f.get("linear_key_head_dim"),
        value_dim=f.get("linear_value_head_dim"),
        kernel=f.get("linear_conv_kernel_dim"),
        eps=norm(f).eps,
    )


def _qwen3_next(f: Fields) -> TargetConfig:
    f.skip("full_attention_interval")  # says what `layer_types` are where they are left out
    norms, bias = norm(f, offset=1.0), f.get("attention_bias")
    rope = f.rope(f.get("head_dim"), partial=True)
    attention = replace(gqa(f, bias, bias, norms, rope), gated=True)
    shared = Dense(
        f.get("hidden_size"),
        f.get("shared_expert_intermediate_size"),
        activation(f),
        module="mlp.shared_expert",
    )
    sparse = Moe(softmax_router(f), gated_experts(f), shared, shared_gate=True)
    kinds = layer_types(f, FULL, _LINEAR)
    mixers = {FULL: attention, _LINEAR: _delta_net(f)}
    has_experts, plain = is_sparse(f), dense(f)
    layers = [
        Layer(mixers[kind], sparse if has_experts(i) else plain, norms, f.get("hidden_size"))
        for i, kind in enumerate(kinds)
    ]
    return model(f, layers, surplus=(r"^mtp\.",))


ARCHITECTURES = {"Qwen3NextForCausalLM": described("qwen3_next", _qwen3_next)}
