"""Llama and those that differ from it by biases, head norms and windows: Mistral, Qwen2, Qwen3.

Behaviour: transformers `models/{llama,mistral,qwen2,qwen3}`.
"""

from dataclasses import replace

from dump.target.families.common import FULL, SLIDING, dense, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.gqa import Gqa
from dump.target.spec import Layer, TargetConfig


def _llama(f: Fields) -> TargetConfig:
    bias = bool(f.get("attention_bias", False))
    f.only("rope_interleaved", (False,), False)
    attention, feed_forward = gqa(f, bias, bias), dense(f, bool(f.get("mlp_bias", False)))
    return _uniform(f, attention, feed_forward)


def _mistral(f: Fields) -> TargetConfig:
    window = f.nullable("sliding_window", 4096)
    f.only("layer_types", (None,), None)
    return _uniform(f, replace(gqa(f), window=window), dense(f))


def _qwen2(f: Fields) -> TargetConfig:
    return _windowed(f, gqa(f, bias=True), dense(f))


def _qwen3(f: Fields) -> TargetConfig:
    bias = bool(f.get("attention_bias", False))
    return _windowed(f, gqa(f, bias, bias, head_norm=norm(f)), dense(f))


def _uniform(f: Fields, attention: Gqa, feed_forward) -> TargetConfig:
    layer = Layer(attention, feed_forward, norm(f), f.size("hidden_size"))
    return model(f, [layer] * f.size("num_hidden_layers"))


def _windowed(f: Fields, attention: Gqa, feed_forward) -> TargetConfig:
    """Layers from `max_window_layers` on see a window if `use_sliding_window` is set."""
    n, first = f.size("num_hidden_layers"), f.get("max_window_layers", 28)
    windowed = bool(f.get("use_sliding_window", False))
    window = f.get("sliding_window", 4096)
    kinds = layer_types(f, [SLIDING if windowed and i >= first else FULL for i in range(n)])
    base = Layer(attention, feed_forward, norm(f), f.size("hidden_size"))
    slides = replace(base, attention=replace(attention, window=window if windowed else None))
    return model(f, [slides if kind == SLIDING else base for kind in kinds])


ARCHITECTURES = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}
