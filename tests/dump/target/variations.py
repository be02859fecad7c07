"""Configurations beside the goldens: every switch of every family, alone and a few of them together."""

import random
from collections.abc import Iterator
from typing import Any

from tests.goldens import golden

Changes = dict[str, Any]
ABSENT = "absent"  # the field is left out

_OLD_ROPE = {
    "plain": None,
    "linear": {"type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_of_all_positions": {"rope_type": "yarn", "factor": 2.0},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
    "yarn_attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 0.7,
        "original_max_position_embeddings": 32,
    },
}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
_MSCALES = {
    "mscale": {"rope_scaling": _YARN | {"mscale": 0.8, "mscale_all_dim": 0.4}},
    "mscale_alone": {"rope_scaling": _YARN | {"mscale": 0.8}},
}


def _ropes() -> dict[str, Changes]:
    """Scalings as `rope_scaling` beside `rope_theta`, and as `rope_parameters`."""
    found: dict[str, Changes] = {}
    for name, scaling in _OLD_ROPE.items():
        found[f"rope_{name}"] = {"rope_scaling": scaling, "rope_theta": 3000.0}
        new = {"rope_type": "default", **(scaling or {}), "rope_theta": 700.0}
        if scaling and "type" in scaling:
            new["rope_type"] = new.pop("type")
        found[f"new_rope_{name}"] = {"rope_parameters": new, "rope_scaling": ABSENT, "rope_theta": ABSENT}
    return found


def _switches(*names: str) -> dict[str, Changes]:
    return {f"{name}={value}": {name: value} for name in names for value in (True, False)}


_ROPE = _ropes()
_SOME_ROPES = {name: _ROPE[name] for name in ("rope_linear", "new_rope_llama3", "rope_yarn_betas")}
_DEFAULT_ROPE: dict[str, Changes] = {
    "no_rope_fields": {"rope_scaling": ABSENT, "rope_theta": ABSENT, "rope_parameters": ABSENT}
}
_ALL: dict[str, Changes] = _switches("tie_word_embeddings") | _DEFAULT_ROPE
_WINDOWS: dict[str, Changes] = {
    "late_window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "unused_window": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 3},
    "kinds": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"] * 2) * 2,
    },
}
_HEADS: dict[str, Changes] = {
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 6},
    "wide_heads": {"head_dim": 10},
}
_SPARSE: dict[str, Changes] = {
    "every_other": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "some_dense": {"mlp_only_layers": [1, 2]},
}
_SHARED: dict[str, Changes] = {
    "two_shared": {"n_shared_experts": 2},
    "scaled": {"routed_scaling_factor": 0.7},
    "one_chosen": {"num_experts_per_tok": 1},
}
_LATENT: dict[str, Changes] = (
    _MSCALES | _switches("attention_bias") | {"no_query_rank": {"q_lora_rank": None}}
)

VARIATIONS: dict[str, dict[str, Changes]] = {
    "llama": _ROPE
    | _HEADS
    | _switches("attention_bias", "mlp_bias")
    | {
        "gelu": {"hidden_act": "gelu_pytorch_tanh"},
        "divided_heads": {"head_dim": ABSENT},
        "null_heads": {"head_dim": None, "num_key_value_heads": None},
    },
    "mistral_window": _SOME_ROPES
    | {"no_window": {"sliding_window": None}, "default": {"sliding_window": ABSENT}},
    "qwen2": _SOME_ROPES | _WINDOWS | {"all_kv_heads": {"num_key_value_heads": 5}},
    "qwen3": _SOME_ROPES | _WINDOWS | _HEADS | _switches("attention_bias"),
    "qwen3_moe": _SOME_ROPES
    | _HEADS
    | _SPARSE
    | _switches("attention_bias", "norm_topk_prob")
    | {"window": {"use_sliding_window": True, "sliding_window": 5}, "one_chosen": {"num_experts_per_tok": 1}},
    "qwen3_next": _SPARSE
    | _switches("attention_bias", "norm_topk_prob")
    | {
        "rotates_half": {"partial_rotary_factor": 0.5},
        "rotates_all": {"partial_rotary_factor": 1.0},
        "default_part": {"partial_rotary_factor": ABSENT},
        "yarn_in_part": {"rope_scaling": _YARN, "partial_rotary_factor": 0.5},
        "every_third": {"full_attention_interval": 3},
        "kinds": {"layer_types": (["full_attention"] * 2 + ["linear_attention"]) * 3},
        "ungrouped": {"linear_num_key_heads": 6},
        "short_kernel": {"linear_conv_kernel_dim": 2},
        "one_kv_head": {"num_key_value_heads": 1},
    },
    "deepseek_v2": _LATENT
    | _SHARED
    | {
        "greedy": {"topk_method": "greedy"},
        "default_method": {"topk_method": ABSENT},
        "query_rank": {"q_lora_rank": 11},
        "no_dense": {"first_k_dense_replace": 0},
        "two_of_two": {"n_group": 2, "topk_group": 2},
    },
    "deepseek_v3": _LATENT
    | _SHARED
    | _switches("rope_interleave", "norm_topk_prob")
    | {
        "no_groups": {"n_group": 1, "topk_group": 1},
        "one_group_open": {"n_group": 4, "topk_group": 1},
        "no_dense": {"first_k_dense_replace": 0},
        "default_scale": {"routed_scaling_factor": ABSENT},
    },
    "glm4_moe": _SOME_ROPES
    | _SHARED
    | _switches("use_qk_norm", "attention_bias", "norm_topk_prob")
    | {
        "quarter": {"partial_rotary_factor": 0.25},
        "rotates_all": {"partial_rotary_factor": 1.0},
        "default_part": {"partial_rotary_factor": ABSENT},
        "groups": {"n_group": 2, "topk_group": 1},
    },
    "glm4_moe_lite": _LATENT
    | _SHARED
    | _switches("rope_interleave", "norm_topk_prob")
    | {
        "kinds": {"first_k_dense_replace": ABSENT, "mlp_layer_types": ["sparse", "dense"] * 4},
        "groups": {"n_group": 2, "topk_group": 1},
        "default_kinds": {"first_k_dense_replace": ABSENT},
    },
    "glm_moe_dsa": _SHARED
    | _switches("norm_topk_prob", "attention_bias")
    | {
        "no_dense": {"first_k_dense_replace": 0},
        "kinds": {"first_k_dense_replace": 2, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6},
        "groups": {"n_group": 2, "topk_group": 1},
    },
    "minimax_m2": _SOME_ROPES
    | {
        "rotates_all": {"rotary_dim": ABSENT},
        "a_pair": {"rotary_dim": 2},
        "by_factor": {"rotary_dim": ABSENT, "partial_rotary_factor": 0.5},
        "one_kv_head": {"num_key_value_heads": 1},
        "one_chosen": {"num_experts_per_tok": 1},
    },
    "gpt_oss": _SOME_ROPES
    | _HEADS
    | _switches("attention_bias")
    | {
        "all_full": {"layer_types": ["full_attention"] * 8},
        "default_kinds": {"layer_types": ABSENT},
        "default_limits": {"swiglu_limit": ABSENT},
        "other_gate": {"swiglu_alpha": 1.1, "swiglu_limit": 0.4},
        "one_chosen": {"num_experts_per_tok": 1},
    },
    "gemma3": _HEADS
    | _switches("attention_bias")
    | {
        "every_other": {"sliding_window_pattern": 2},
        "default_pattern": {"sliding_window_pattern": ABSENT},
        "kinds": {"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 6},
        "thetas": {"rope_theta": 500.0, "rope_local_base_freq": 50.0},
        "no_scaling": {"rope_scaling": None},
        "each": {
            "rope_scaling": ABSENT,
            "rope_theta": ABSENT,
            "rope_local_base_freq": ABSENT,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
            },
        },
        "other_scale": {"query_pre_attn_scalar": 17},
    },
}


def config(family: str, *names: str) -> dict[str, Any]:
    """The golden's config.json with some variations."""
    raw = golden.config(family)
    for name in names:
        raw |= (VARIATIONS[family] | _ALL)[name]
    return {field: value for field, value in raw.items() if value != ABSENT}


def _fields(family: str, name: str) -> set[str]:
    return set((VARIATIONS[family] | _ALL)[name])


def chosen(family: str, together: int = 4) -> Iterator[tuple[str, ...]]:
    """Every variation alone, and some of three that touch different fields."""
    names = sorted(VARIATIONS[family] | _ALL)
    yield from ((name,) for name in names)
    draw = random.Random(family)
    for _ in range(together):
        picked: list[str] = []
        for name in draw.sample(names, len(names)):
            if len(picked) < 3 and not any(
                _fields(family, name) & _fields(family, other) for other in picked
            ):
                picked.append(name)
        yield tuple(picked)
