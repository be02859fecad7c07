"""gpt-oss: attention sinks, alternating windows, experts with biases and a clamped gate.

Behaviour: transformers `models/gpt_oss`.
"""

from dataclasses import replace

from dump.target.families.common import FULL, SLIDING, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.moe import ClampedExperts, Moe
from dump.target.routing import Router
from dump.target.spec import Layer, TargetConfig


def _gpt_oss(f: Fields) -> TargetConfig:
    f.only("hidden_act", ("silu",), "silu")
    f.skip("experts_per_token", "initial_context_length")  # repeated under other names
    bias = bool(f.get("attention_bias", True))
    attention = replace(gqa(f, bias, bias), sinks=True)
    H = f.size("hidden_size")
    experts = f.any_size("num_local_experts", "num_experts")
    router = Router(
        H, experts, f.size("num_experts_per_tok"), "selected_softmax", module="mlp.router", bias=True
    )
    clamped = ClampedExperts(
        H, f.size("intermediate_size"), f.get("swiglu_alpha", 1.702), f.get("swiglu_limit", 7.0)
    )
    base = Layer(attention, Moe(router, clamped, split="expert"), norm(f), H)
    slides = replace(base, attention=replace(attention, window=f.size("sliding_window", 128)))
    n = f.size("num_hidden_layers")
    kinds = layer_types(f, [FULL if i % 2 else SLIDING for i in range(n)])
    return model(f, [slides if kind == SLIDING else base for kind in kinds])


ARCHITECTURES = {"GptOssForCausalLM": _gpt_oss}
