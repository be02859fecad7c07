"""DeepSeek-V2, -V3 and -R1, and the GLM models built like them: latent attention, grouped routing.

Behaviour: transformers `models/{deepseek_v2,deepseek_v3,glm4_moe_lite,glm_moe_dsa}`.
"""

from common.rope import magnitude
from dump.target.dense import Dense
from dump.target.families.common import activation, dense, gated_experts, model, norm
from dump.target.fields import Fields
from dump.target.mla import Mla
from dump.target.moe import Moe
from dump.target.routing import Router
from dump.target.spec import Layer, TargetConfig

_REPEATED = (
    "qk_head_dim",
    "head_dim",
    "num_key_value_heads",
    "ep_size",
    "num_nextn_predict_layers",
    "num_mtp_layers",
)


def _mla(f: Fields, interleaved: bool, query_rank: int | None) -> Mla:
    plain, rotated = f.size("qk_nope_head_dim"), f.size("qk_rope_head_dim")
    f.only("partial_rotary_factor", (1.0,), 1.0)
    rope = f.rope(rotated)
    scaling = dict(rope.scaling)
    scale = (plain + rotated) ** -0.5
    if scaling.get("mscale_all_dim"):
        scale *= magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return Mla(
        hidden=f.size("hidden_size"),
        heads=f.size("num_attention_heads"),
        query_rank=query_rank,
        latent=f.size("kv_lora_rank"),
        plain_dim=plain,
        rope=rope,
        value_dim=f.size("v_head_dim"),
        scale=scale,
        interleaved=interleaved,
        bias=bool(f.get("attention_bias", False)),
    )


def sigmoid_router(f: Fields) -> Router:
    """Sigmoid scores, a bias that counts in the choice alone, experts limited to the best groups."""
    f.only("scoring_func", ("sigmoid",), "sigmoid")
    f.only("topk_method", ("noaux_tc",), "noaux_tc")
    return Router(
        hidden=f.size("hidden_size"),
        experts=f.any_size("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=f.size("num_experts_per_tok"),
        scoring="sigmoid",
        renormalise=bool(f.get("norm_topk_prob", True)),
        scale=float(f.get("routed_scaling_factor", 1.0)),
        correction="mlp.gate.e_score_correction_bias",
        groups=f.size("n_group", 1),
        groups_kept=f.size("topk_group", 1),
    )


def _greedy_router(f: Fields) -> Router:
    """Softmax scores of DeepSeek-V2, the best of all experts or of the best groups."""
    f.only("scoring_func", ("softmax",), "softmax")
    f.only("norm_topk_prob", (False,), False)
    limited = f.only("topk_method", ("greedy", "group_limited_greedy"), "greedy") != "greedy"
    groups, kept = f.size("n_group", 1), f.size("topk_group", 1)
    return Router(
        hidden=f.size("hidden_size"),
        experts=f.size("n_routed_experts"),
        top_k=f.size("num_experts_per_tok"),
        scale=float(f.get("routed_scaling_factor", 1.0)),
        groups=groups if limited else 1,
        groups_kept=kept if limited else 1,
        group_best=1,
    )


def shared_moe(f: Fields, router: Router) -> Moe:
    """Routed experts and `n_shared_experts` that every token goes to, as one wide expert."""
    experts = gated_experts(f)
    shared = experts.ffn * f.size("n_shared_experts")
    return Moe(router, experts, Dense(router.hidden, shared, activation(f), module="mlp.shared_experts"))


def leading_dense(f: Fields, attention, router: Router, first: int, **more) -> TargetConfig:
    """`first` dense layers, then layers with experts; or as `mlp_layer_types` says."""
    f.only("moe_layer_freq", (1,), 1)
    f.only("mlp_bias", (False,), False)
    f.skip(*_REPEATED)
    n = f.size("num_hidden_layers")
    first = f.get("first_k_dense_replace", first)
    kinds = f.get("mlp_layer_types", ["dense"] * first + ["sparse"] * (n - first))
    parts = {"dense": dense(f), "sparse": shared_moe(f, router)}
    layers = {kind: Layer(attention, part, norm(f), router.hidden) for kind, part in parts.items()}
    return model(f, [layers[kind] for kind in kinds[:n]], **more)


def _deepseek_v2(f: Fields) -> TargetConfig:
    return leading_dense(f, _mla(f, True, f.nullable("q_lora_rank", 1536)), _greedy_router(f), 0)


def _deepseek_v3(f: Fields) -> TargetConfig:
    attention = _mla(f, bool(f.get("rope_interleave", True)), f.nullable("q_lora_rank", 1536))
    return leading_dense(f, attention, sigmoid_router(f), 3)


def _glm4_moe_lite(f: Fields) -> TargetConfig:
    attention = _mla(f, bool(f.get("rope_interleave", True)), f.nullable("q_lora_rank", 768))
    return leading_dense(f, attention, sigmoid_router(f), 1)


def _glm_moe_dsa(f: Fields) -> TargetConfig:
    """Up to `index_topk` tokens the indexer keeps every key, and sparse attention is full attention."""
    limit = f.size("index_topk", 2048)
    f.only("rope_interleave", (True,), True)
    f.skip("index_head_dim", "index_n_heads", "indexer_types", "indexer_rope_interleave", "layer_types")
    f.skip("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    reason = f"its sparse attention equals full attention only up to index_topk={limit}"
    surplus = (r"\.self_attn\.indexer\.",)
    attention = _mla(f, True, f.size("q_lora_rank"))
    more = {"max_length": limit, "max_length_reason": reason, "surplus": surplus}
    return leading_dense(f, attention, sigmoid_router(f), 3, **more)


ARCHITECTURES = {
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
    "Glm4MoeLiteForCausalLM": _glm4_moe_lite,
    "GlmMoeDsaForCausalLM": _glm_moe_dsa,
}
