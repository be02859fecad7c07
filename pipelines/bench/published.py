"""What the published config.json of every target says, without what no forward pass depends on.

{recipe: config.json}. Numbers come from the published files, or from copies of them in public repositories;
the lists of modules that a float8 checkpoint leaves alone are shortened to patterns of the same meaning.
"""

from typing import Any

from pipelines.bench.published_dense import DENSE, compressed, fields, qwen3

BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def _qwen3_moe(*sizes: int, width: int, **more: Any) -> dict[str, Any]:
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": width,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    }
    return qwen3(*sizes) | experts | more


def _qwen3_next(**more: Any) -> dict[str, Any]:
    return (
        fields(48, 2048, 5120, 16, 2, 151936)
        | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "head_dim": 256,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_scaling": None,
            "full_attention_interval": 4,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": False,
            "attention_bias": False,
        }
        | more
    )


def _latent(query: int | None, latent: int, plain: int, rotated: int, value: int) -> dict[str, Any]:
    return {
        "q_lora_rank": query,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value,
        "attention_bias": False,
    }


def _experts(
    routed: int, shared: int, chosen: int, width: int, dense: int, scale: float, **more: Any
) -> dict[str, Any]:
    return {
        "n_routed_experts": routed,
        "n_shared_experts": shared,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "first_k_dense_replace": dense,
        "routed_scaling_factor": scale,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
    } | more


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


def _deepseek_v3() -> dict[str, Any]:
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 8, "topk_group": 4}
    return (
        fields(61, 7168, 18432, 128, 128, 129280)
        | _latent(1536, 512, 128, 64, 128)
        | _experts(256, 1, 8, 2048, 3, 2.5, **routing)
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
            "max_position_embeddings": 163840,
            "moe_layer_freq": 1,
            "ep_size": 1,
            "rope_theta": 10000,
            "rope_scaling": _yarn(1.0),
            "quantization_config": BLOCKS,
        }
    )


def _minimax(**more: Any) -> dict[str, Any]:
    kept = ["gate", "e_score_correction_bias", "lm_head"]
    return (
        fields(62, 3072, 1536, 48, 8, 200064)
        | {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "auto_map": {"AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
            "attn_type_list": [1] * 62,
            "head_dim": 128,
            "rotary_dim": 64,
            "rope_theta": 5000000,
            "mlp_intermediate_size": 8192,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "shared_intermediate_size": 0,
            "use_mtp": True,
            "num_mtp_modules": 3,
            "mtp_transformer_layers": 1,
            "quantization_config": BLOCKS | {"fmt": "float8_e4m3fn", "modules_to_not_convert": kept},
        }
        | more
    )


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return fields(layers, 2880, 2880, 64, 8, 201088) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept},
    }


def _glm_moe(**more: Any) -> dict[str, Any]:
    return fields(92, 5120, 12288, 96, 8, 151552) | _experts(160, 1, 8, 1536, 3, 2.5) | more


_NEXT_KEPT = ["lm_head", "re:.*conv1d$", "re:.*in_proj_ba$", "re:.*gate$"]

PUBLISHED: dict[str, dict[str, Any]] = DENSE | {
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 6144, 32, 4, width=768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 12288, 64, 4, width=1536),
    "qwen3-coder-30b-a3b": _qwen3_moe(48, 2048, 6144, 32, 4, width=768)
    | {"rope_theta": 10000000, "use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
    "qwen3-next-80b-a3b": _qwen3_next(),
    "qwen3-coder-next": _qwen3_next(rope_theta=5000000),
    "qwen3-coder-next-fp8": _qwen3_next(
        rope_theta=5000000, quantization_config=BLOCKS | {"modules_to_not_convert": _NEXT_KEPT}
    ),
    "deepseek-v2-lite": fields(27, 2048, 10944, 16, 16, 102400)
    | _latent(None, 512, 128, 64, 128)
    | _experts(64, 2, 6, 1408, 1, 1.0, norm_topk_prob=False, num_nextn_predict_layers=None)
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "rope_theta": 10000,
        "rope_scaling": _yarn(0.707),
    },
    "deepseek-v3": _deepseek_v3(),
    "deepseek-r1": _deepseek_v3(),
    "glm-4.7-flash": fields(47, 2048, 10240, 20, 20, 154880)
    | _latent(768, 512, 192, 64, 256)
    | _experts(64, 1, 4, 1536, 1, 1.8, topk_method="noaux_tc")
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "partial_rotary_factor": 1.0,
        "rope_theta": 1000000,
        "rope_scaling": None,
    },
    "glm-4.7-fp8": _glm_moe(
        architectures=["Glm4MoeForCausalLM"],
        model_type="glm4_moe",
        head_dim=128,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        rope_theta=1000000,
        rope_scaling=None,
        quantization_config=compressed("lm_head", "re:.*mlp.gate$"),
    ),
    "glm-5-fp8": fields(78, 6144, 12288, 64, 64, 154880)
    | _latent(2048, 512, 192, 64, 256)
    | _experts(256, 1, 8, 2048, 3, 2.5, topk_method="noaux_tc", scoring_func="sigmoid")
    | {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "head_dim": 64,
        "qk_head_dim": 256,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 2048,
        "indexer_rope_interleave": True,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "quantization_config": BLOCKS
        | {"modules_to_not_convert": ["lm_head", "model.embed_tokens", "re:.*mlp.gate$"]},
    },
    "minimax-m2": _minimax(),
    "minimax-m2.5": _minimax(),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
