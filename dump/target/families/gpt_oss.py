"""gpt-oss: attention sinks, alternating windows, experts with biases and a clamped gate.

Behaviour: transformers `models/gpt_oss`.
"""

from dataclasses import replace

from dump.target.families.common import FULL, SLIDING, described, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.moe import ClampedExperts, Moe
from dump.target.routing import Router
from dump.target.spec import Layer, TargetConfig


def _gpt_oss(f: Fields) -> TargetConfig:
    f.only("hidden_act", "silu")
    f.skip("experts_per_token", "initial_context_length")  # repeated under other names
    bias = f.get("attention_bias")
    attention = replace(gqa(f, bias, bias), sinks=True)
    H = f.get("hidden_size")
    experts = f.alike("num_local_experts", "num_experts")
    router = Router(
        H, experts, f.get("num_experts_per_tok"), "selected_softmax", module="mlp.router", bias=True
    )
    clamped = ClampedExperts(H, f.get("intermediate_size"), f.get("swiglu_alpha"), f.get("swiglu_limit"))
    base = Layer(attention, Moe(router, clamped, split="expert"), norm(f), H)
    slides = replace(base, attention=replace(attention, window=f.get("sliding_window", None)))
    return model(f, [slides if kind == SLIDING else base for kind in layer_types(f, FULL, SLIDING)])


ARCHITECTURES = {"GptOssForCausalLM": described("gpt_oss", _gpt_oss)}
