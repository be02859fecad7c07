"""Qwen3 with experts: GQA with head norms, softmax routing.

Behaviour: transformers `models/qwen3_moe`.
"""

from collections.abc import Callable
from dataclasses import replace

from dump.target.families.common import FULL, dense, described, gated_experts, gqa, model, norm
from dump.target.fields import Fields
from dump.target.moe import Moe
from dump.target.routing import Router
from dump.target.spec import Layer, TargetConfig


def softmax_router(f: Fields) -> Router:
    """Softmax over all experts; if the config has the chosen ones renormalised, that is over those alone."""
    experts = f.alike("num_experts", "num_local_experts")
    renormalise = f.get("norm_topk_prob")
    scoring = "selected_softmax" if renormalise else "softmax"
    return Router(f.get("hidden_size"), experts, f.get("num_experts_per_tok"), scoring)


def is_sparse(f: Fields) -> Callable[[int], bool]:
    """Whether a layer has experts."""
    step, dense_layers = f.get("decoder_sparse_step"), set(f.get("mlp_only_layers", []))
    return lambda i: i not in dense_layers and (i + 1) % step == 0


def _qwen3_moe(f: Fields) -> TargetConfig:
    bias = f.get("attention_bias")
    attention = gqa(f, bias, bias, head_norm=norm(f))
    window = f.get("sliding_window", None)
    if f.get("use_sliding_window"):
        attention = replace(attention, window=window)
    f.skip("max_window_layers")
    f.only("use_qk_norm", True)
    n = f.get("num_hidden_layers")
    f.only("layer_types", [FULL] * n)
    sparse = Layer(attention, Moe(softmax_router(f), gated_experts(f)), norm(f), f.get("hidden_size"))
    plain = replace(sparse, feed_forward=dense(f))
    has_experts = is_sparse(f)
    return model(f, [sparse if has_experts(i) else plain for i in range(n)])


ARCHITECTURES = {"Qwen3MoeForCausalLM": described("qwen3_moe", _qwen3_moe)}
