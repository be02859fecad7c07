"""What the published config.json of the dense targets says; see published.py."""

from typing import Any


def compressed(*ignore: str) -> dict[str, Any]:
    """Float8 with one scale a row, as compressed-tensors writes it."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": list(ignore)}


def fields(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def _llama(*sizes: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 131072}
    return fields(*sizes, 128256) | about | {"rope_theta": 500000.0, "rope_scaling": scaling} | more


def _qwen2(*sizes: int, vocab: int = 152064, **more: Any) -> dict[str, Any]:
    window = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": sizes[0]}
    about = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0}
    return fields(*sizes, vocab) | about | window | more


def qwen3(*sizes: int) -> dict[str, Any]:
    about = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
    window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": sizes[0]}
    return (
        fields(*sizes, 151936)
        | about
        | window
        | {"rope_theta": 1000000, "rope_scaling": None, "attention_bias": False}
    )


def _gemma3_text(*sizes: int) -> dict[str, Any]:
    found = fields(*sizes)
    return {name: value for name, value in found.items() if name not in ("hidden_act", "tie_word_embeddings")}


def _gemma3(layers: int, hidden: int, ffn: int, **more: Any) -> dict[str, Any]:
    """The multimodal files: the text decoder's fields in `text_config`, its defaults left out."""
    text = {
        "model_type": "gemma3_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": text | more,
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }


DENSE: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, factor=32.0, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, 8),
    "llama-3.3-70b-fp8": _llama(80, 8192, 28672, 64, 8)
    | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}},
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, 8),
    "qwen2.5-72b-fp8": _qwen2(80, 8192, 29568, 64, 8, quantization_config=compressed("lm_head")),
    "r1-distill-qwen-7b": _qwen2(28, 3584, 18944, 28, 4, rope_theta=10000),
    "r1-distill-qwen-14b": _qwen2(48, 5120, 13824, 40, 8),
    "qwen3-8b": qwen3(36, 4096, 12288, 32, 8),
    "qwen3-14b": qwen3(40, 5120, 17408, 40, 8),
    "qwen3-32b": qwen3(64, 5120, 25600, 64, 8),
    "gemma-3-1b": _gemma3_text(26, 1152, 6912, 4, 1, 262144)
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
    },
    "gemma-3-4b": _gemma3(34, 2560, 10240),
    "gemma-3-12b": _gemma3(48, 3840, 15360, num_attention_heads=16, num_key_value_heads=8),
    "gemma-3-27b": _gemma3(
        62,
        5376,
        21504,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
    ),
}
