"""DeepSeek-V2, -V3 and -R1, and the GLM models built like them: latent attention, grouped routing.

Behaviour: transformers `models/{deepseek_v2,deepseek_v3,glm4_moe_lite,glm_moe_dsa}`.
"""

from common.errors import EyasError
from common.rope import magnitude
from dump.target.dense import Dense
from dump.target.families.common import activation, dense, described, gated_experts, layer_types, model, norm
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
    plain, rotated = f.get("qk_nope_head_dim"), f.get("qk_rope_head_dim")
    rope = f.rope(rotated)
    scaling = dict(rope.scaling)
    scale = (plain + rotated) ** -0.5
    if scaling.get("mscale_all_dim"):
        scale *= magnitude(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return Mla(
        hidden=f.get("hidden_size"),
        heads=f.get("num_attention_heads"),
        query_rank=query_rank,
        latent=f.get("kv_lora_rank"),
        plain_dim=plain,
        rope=rope,
        value_dim=f.get("v_head_dim"),
        scale=scale,
        interleaved=interleaved,
        bias=f.get("attention_bias"),
    )


def sigmoid_router(f: Fields) -> Router:
    """Sigmoid scores, a bias that counts in the choice alone, experts limited to the best groups."""
    f.only("scoring_func", "sigmoid")
    f.only("topk_method", "noaux_tc")
    return Router(
        hidden=f.get("hidden_size"),
        experts=f.alike("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=f.get("num_experts_per_tok"),
        scoring="sigmoid",
        renormalise=f.get("norm_topk_prob"),
        scale=float(f.get("routed_scaling_factor")),
        correction="mlp.gate.e_score_correction_bias",
        groups=f.get("n_group", 1),
        groups_kept=f.get("topk_group", 1),
    )


def _greedy_router(f: Fields) -> Router:
    """Softmax scores of DeepSeek-V2, the best of all experts or of the best groups."""
    f.only("scoring_func", "softmax")
    f.only("norm_topk_prob", False)
    limited = f.only("topk_method", "greedy", "group_limited_greedy") != "greedy"
    groups, kept = f.get("n_group", 1), f.get("topk_group", 1)
    return Router(
        hidden=f.get("hidden_size"),
        experts=f.alike("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=f.get("num_experts_per_tok"),
        scale=float(f.get("routed_scaling_factor")),
        groups=groups if limited else 1,
        groups_kept=kept if limited else 1,
        group_best=1,
    )


def shared_moe(f: Fields, router: Router) -> Moe:
    """Routed experts and `n_shared_experts` that every token goes to, as one wide expert."""
    experts = gated_experts(f)
    shared = experts.ffn * f.get("n_shared_experts")
    return Moe(router, experts, Dense(router.hidden, shared, activation(f), module="mlp.shared_experts"))


def leading_dense(f: Fields, attention, router: Router, **more) -> TargetConfig:
    """`first_k_dense_replace` dense layers, then layers with experts; or as `mlp_layer_types` says."""
    f.only("moe_layer_freq", 1)
    f.only("mlp_bias", False)
    f.skip(*_REPEATED)
    parts = {"dense": dense(f), "sparse": shared_moe(f, router)}
    layers = {kind: Layer(attention, part, norm(f), router.hidden) for kind, part in parts.items()}
    return model(f, [layers[kind] for kind in _kinds(f)], **more)


def _kinds(f: Fields) -> list[str]:
    """The kind of each layer. EyasError where the two fields differ, as each is what some servers read."""
    n, first = f.get("num_hidden_layers"), f.get("first_k_dense_replace", None)
    leading = None if first is None else ["dense" if i < first else "sparse" for i in range(n)]
    if f.get("mlp_layer_types", None) is None:
        return leading
    kinds = layer_types(f, "dense", "sparse", name="mlp_layer_types")
    if leading not in (None, kinds):
        raise EyasError(
            f"{f.where}: first_k_dense_replace={first}, but mlp_layer_types has {kinds.count('dense')} "
            f"dense of {n} layers, or in another order (what is left out is transformers'); make them agree"
        )
    return kinds


def _deepseek_v2(f: Fields) -> TargetConfig:
    return leading_dense(f, _mla(f, True, f.get("q_lora_rank", None)), _greedy_router(f))


def _deepseek_v3(f: Fields) -> TargetConfig:
    attention = _mla(f, f.get("rope_interleave"), f.get("q_lora_rank", None))
    return leading_dense(f, attention, sigmoid_router(f))


def _glm_moe_dsa(f: Fields) -> TargetConfig:
    """Up to `index_topk` tokens the indexer keeps every key, and sparse attention is full attention."""
    limit = f.get("index_topk")
    f.only("rope_interleave", True)
    f.skip("index_head_dim", "index_n_heads", "indexer_types", "indexer_rope_interleave", "layer_types")
    f.skip("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")
    reason = f"its sparse attention equals full attention only up to index_topk={limit}"
    surplus = (r"\.self_attn\.indexer\.",)
    attention = _mla(f, True, f.get("q_lora_rank"))
    more = {"max_length": limit, "max_length_reason": reason, "surplus": surplus}
    return leading_dense(f, attention, sigmoid_router(f), **more)


ARCHITECTURES = {
    "DeepseekV2ForCausalLM": described("deepseek_v2", _deepseek_v2),
    "DeepseekV3ForCausalLM": described("deepseek_v3", _deepseek_v3),
    "Glm4MoeLiteForCausalLM": described("glm4_moe_lite", _deepseek_v3),
    "GlmMoeDsaForCausalLM": described("glm_moe_dsa", _glm_moe_dsa),
}
