"""Llama and those that differ from it by biases, head norms and windows: Mistral, Qwen2, Qwen3.

Behaviour: transformers `models/{llama,mistral,qwen2,qwen3}`.
"""

from dataclasses import replace

from dump.target.families.common import FULL, SLIDING, dense, described, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.gqa import Gqa
from dump.target.spec import Layer, TargetConfig


def _llama(f: Fields) -> TargetConfig:
    bias = f.get("attention_bias")
    f.only("rope_interleaved", False)
    return _uniform(f, gqa(f, bias, bias), dense(f, f.get("mlp_bias")))


def _mistral(f: Fields) -> TargetConfig:
    f.only("layer_types", None)
    return _uniform(f, replace(gqa(f), window=f.get("sliding_window", None)), dense(f))


def _qwen2(f: Fields) -> TargetConfig:
    return _windowed(f, gqa(f, bias=True), dense(f))


def _qwen3(f: Fields) -> TargetConfig:
    bias = f.get("attention_bias")
    return _windowed(f, gqa(f, bias, bias, head_norm=norm(f)), dense(f))


def _uniform(f: Fields, attention: Gqa, feed_forward) -> TargetConfig:
    layer = Layer(attention, feed_forward, norm(f), f.get("hidden_size"))
    return model(f, [layer] * f.get("num_hidden_layers"))


def _windowed(f: Fields, attention: Gqa, feed_forward) -> TargetConfig:
    """Layers of the kind "sliding_attention" see a window if `use_sliding_window` is set."""
    f.skip("max_window_layers")  # says what `layer_types` are where they are left out
    window, windowed = f.get("sliding_window", None), f.get("use_sliding_window")
    base = Layer(attention, feed_forward, norm(f), f.get("hidden_size"))
    slides = replace(base, attention=replace(attention, window=window if windowed else None))
    return model(f, [slides if kind == SLIDING else base for kind in layer_types(f, FULL, SLIDING)])


ARCHITECTURES = {
    "LlamaForCausalLM": described("llama", _llama),
    "MistralForCausalLM": described("mistral", _mistral),
    "Qwen2ForCausalLM": described("qwen2", _qwen2),
    "Qwen3ForCausalLM": described("qwen3", _qwen3),
}
