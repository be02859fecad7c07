"""MiniMax-M2: GQA with norms over all heads together, a partial rotation, sigmoid routing.

Behaviour: transformers `models/minimax_m2`.
"""

from dataclasses import replace

from common.errors import EyasError
from dump.target.families.common import described, gated_experts, gqa, model, norm
from dump.target.fields import Fields
from dump.target.moe import Moe
from dump.target.routing import Router
from dump.target.spec import Layer, TargetConfig

# Canonical pieces of weight names and MiniMax's own.
_RENAMES = (
    ("mlp.", "block_sparse_moe."),
    ("gate_proj", "w1"),
    ("up_proj", "w3"),
    ("down_proj", "w2"),
)


def _minimax_m2(f: Fields) -> TargetConfig:
    f.only("scoring_func", "sigmoid")
    f.only("use_routing_bias", True)
    f.only("use_qk_norm", True)
    f.only("qk_norm_type", "per_layer")
    f.only("shared_intermediate_size", 0)
    if any(kind != 1 for kind in f.get("attn_type_list", [])):
        raise EyasError(
            f"{f.where}: attn_type_list has a kind other than 1 (full attention); it is not supported"
        )
    for part in ("full_attention", "linear_attention", "mlp"):
        f.only(f"layernorm_{part}_beta", 1.0)
    f.skip("shared_moe_mode")  # of shared experts, which shared_intermediate_size = 0 rules out
    f.skip("mtp_transformer_layers", "num_mtp_modules", "use_mtp", "rms_norm_type", "mlp_intermediate_size")
    attention = replace(gqa(f, rope=f.rope(f.get("head_dim"), partial=True)), row_norm=norm(f))
    router = Router(
        hidden=f.get("hidden_size"),
        experts=f.alike("num_local_experts", "num_experts"),
        top_k=f.get("num_experts_per_tok"),
        scoring="sigmoid",
        renormalise=True,
        correction="mlp.e_score_correction_bias",
    )
    moe = Moe(router, gated_experts(f, "intermediate_size"))
    layer = Layer(attention, moe, norm(f), router.hidden, renames=_RENAMES)
    return model(f, [layer] * f.get("num_hidden_layers"))


ARCHITECTURES = {"MiniMaxM2ForCausalLM": described("minimax_m2", _minimax_m2)}
