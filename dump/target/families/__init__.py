"""Families of targets: each module says how its config.json describes a decoder."""

from collections.abc import Callable

from dump.target.families import deepseek, gemma, glm, gpt_oss, llama, minimax, qwen_moe, qwen_next
from dump.target.fields import Fields
from dump.target.spec import TargetConfig

FAMILIES: dict[str, Callable[[Fields], TargetConfig]] = {
    **deepseek.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **glm.ARCHITECTURES,
    **gpt_oss.ARCHITECTURES,
    **llama.ARCHITECTURES,
    **minimax.ARCHITECTURES,
    **qwen_moe.ARCHITECTURES,
    **qwen_next.ARCHITECTURES,
}
"""Architecture (as config.json names it) -> its description."""

PUBLISHED_WITH_CODE = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniMaxM2ForCausalLM"})
"""Architectures whose published files carry code of their own (auto_map), which transformers has taken in
since. It is never run; for any other architecture auto_map is refused, as it may mean another model."""
