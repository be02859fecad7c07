"""GLM-4.5 to 4.7: GQA with a partial rotation and optional head norms, DeepSeek-V3's routing.

Behaviour: transformers `models/glm4_moe`.
"""

from dump.target.families.common import gqa, norm
from dump.target.families.deepseek import leading_dense, sigmoid_router
from dump.target.fields import Fields
from dump.target.spec import TargetConfig


def _glm4_moe(f: Fields) -> TargetConfig:
    f.defaults(partial_rotary_factor=0.5)
    head_norm = norm(f) if f.get("use_qk_norm", False) else None
    attention = gqa(f, bias=bool(f.get("attention_bias", False)), head_norm=head_norm)
    return leading_dense(f, attention, sigmoid_router(f), 1)


ARCHITECTURES = {"Glm4MoeForCausalLM": _glm4_moe}
