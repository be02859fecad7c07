"""Gemma 3: local and global layers with rotations of their own, norms around every part, scaled embeddings.

Behaviour: transformers `models/gemma3`; the text decoder of the multimodal checkpoints is the same.
"""

from dataclasses import replace
from typing import Any

from dump.target.families.common import FULL, SLIDING, dense, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.spec import Layer, Rope, TargetConfig

# Published config.json files leave out what equals these (transformers `Gemma3TextConfig`).
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


def _text(f: Fields, prefix: str = "model.", surplus: tuple[str, ...] = ()) -> TargetConfig:
    f.defaults(**_DEFAULTS)
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        f.only(name, (None,), None)
    f.only("use_bidirectional_attention", (False,), False)
    bias = bool(f.get("attention_bias", False))
    norms = norm(f, offset=1.0)
    full, local = _ropes(f)
    scale = float(f.get("query_pre_attn_scalar")) ** -0.5
    everywhere = replace(gqa(f, bias, bias, norms, rope=full), scale=scale)
    nearby = replace(everywhere, rope=local, window=f.size("sliding_window"))
    feed_forward = dense(f, activation_field="hidden_activation")
    base = Layer(everywhere, feed_forward, norms, f.size("hidden_size"), sandwich=True)
    slides = replace(base, attention=nearby)
    pattern = f.size("sliding_window_pattern", f.get("_sliding_window_pattern", 6))
    kinds = [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(f.size("num_hidden_layers"))]
    layers = [slides if kind == SLIDING else base for kind in layer_types(f, kinds)]
    scaled = float(f.size("hidden_size")) ** 0.5
    return model(f, layers, embed_scale=scaled, prefix=prefix, surplus=surplus)


def _ropes(f: Fields) -> tuple[Rope, Rope]:
    """Rotations of the global and of the local layers, from the new or the old fields."""
    dim = f.size("head_dim")
    each = dict(f.get("rope_parameters", {}))
    full = dict(f.get("rope_scaling", None) or {}) | dict(each.get(FULL) or {})
    local = dict(each.get(SLIDING) or {})
    theta, local_theta = f.get("rope_theta", 1e6), f.get("rope_local_base_freq", 1e4)
    return (
        f.rotation(dim, full.get("rope_theta") or theta, full),
        f.rotation(dim, local.get("rope_theta") or local_theta, local),
    )


def _multimodal(f: Fields) -> TargetConfig:
    """The text decoder of a checkpoint that has a vision tower as well."""
    text = Fields(
        {"architectures": f.raw["architectures"]} | f.get("text_config"), f"{f.where} (text_config)"
    )
    cfg = _text(text, "language_model.model.", (r"^vision_tower\.", r"^multi_modal_projector\."))
    text.finish()
    f.skip("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    f.skip("tie_word_embeddings")
    outer = {name: value for name, value in f.raw.items() if name not in ("text_config", "vision_config")}
    return replace(cfg, raw=f.raw, text=outer | cfg.text)


ARCHITECTURES = {"Gemma3ForCausalLM": _text, "Gemma3ForConditionalGeneration": _multimodal}
