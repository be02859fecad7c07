"""GLM-4.5 to 4.7: GQA with a partial rotation and optional head norms, DeepSeek-V3's routing.

Behaviour: transformers `models/glm4_moe`.
"""

from dump.target.families.common import described, gqa, norm
from dump.target.families.deepseek import leading_dense, sigmoid_router
from dump.target.fields import Fields
from dump.target.spec import TargetConfig


def _glm4_moe(f: Fields) -> TargetConfig:
    head_norm = norm(f) if f.get("use_qk_norm") else None
    head_dim = f.get("head_dim", f.get("hidden_size") // f.get("num_attention_heads"))
    rope = f.rope(head_dim, partial=True)
    attention = gqa(f, bias=f.get("attention_bias"), head_norm=head_norm, rope=rope)
    return leading_dense(f, attention, sigmoid_router(f))


ARCHITECTURES = {"Glm4MoeForCausalLM": described("glm4_moe", _glm4_moe)}
