"""Gemma 3: local and global layers with rotations of their own, norms around every part, scaled embeddings.

Behaviour: transformers `models/gemma3`; the text decoder of the multimodal checkpoints is the same.
"""

from dataclasses import replace

from dump.target.complete import complete
from dump.target.families.common import FULL, SLIDING, dense, described, gqa, layer_types, model, norm
from dump.target.fields import Fields
from dump.target.spec import Layer, Rope, TargetConfig

_MODEL_TYPE = "gemma3_text"


def _text(f: Fields, prefix: str = "model.", surplus: tuple[str, ...] = ()) -> TargetConfig:
    f.only("final_logit_softcapping", None)
    f.only("attn_logit_softcapping", None)
    f.only("use_bidirectional_attention", False)
    # These say what `layer_types` are where they are left out.
    f.skip("sliding_window_pattern", "_sliding_window_pattern")
    bias = f.get("attention_bias")
    norms = norm(f, offset=1.0)
    full, local = _ropes(f)
    scale = float(f.get("query_pre_attn_scalar")) ** -0.5
    everywhere = replace(gqa(f, bias, bias, norms, rope=full), scale=scale)
    nearby = replace(everywhere, rope=local, window=f.get("sliding_window", None))
    feed_forward = dense(f, activation_field="hidden_activation")
    base = Layer(everywhere, feed_forward, norms, f.get("hidden_size"), sandwich=True)
    slides = replace(base, attention=nearby)
    layers = [slides if kind == SLIDING else base for kind in layer_types(f, FULL, SLIDING)]
    scaled = float(f.get("hidden_size")) ** 0.5
    return model(f, layers, embed_scale=scaled, prefix=prefix, surplus=surplus)


def _ropes(f: Fields) -> tuple[Rope, Rope]:
    """Rotations of the global and of the local layers."""
    f.skip("rope_scaling", "rope_theta", "rope_local_base_freq")  # as which `rope_parameters` are written too
    f.only("partial_rotary_factor", 1.0)
    each = f.get("rope_parameters")
    return f.rotation(f.get("head_dim"), each[FULL]), f.rotation(f.get("head_dim"), each[SLIDING])


def _multimodal(f: Fields) -> TargetConfig:
    """The text decoder of a checkpoint that has a vision tower as well."""
    inner = {"architectures": f.get("architectures")} | f.get("text_config")
    text = Fields(inner, f"{f.where} (text_config)")
    complete(text, _MODEL_TYPE)
    cfg = _text(text, "language_model.model.", (r"^vision_tower\.", r"^multi_modal_projector\."))
    text.finish()
    f.skip("vision_config", "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image")
    f.skip("tie_word_embeddings")
    outer = {name: value for name, value in f.found.items() if name not in ("text_config", "vision_config")}
    return replace(cfg, raw=f.found, text=outer | cfg.text)


ARCHITECTURES = {
    "Gemma3ForCausalLM": described(_MODEL_TYPE, _text),
    "Gemma3ForConditionalGeneration": _multimodal,
}
