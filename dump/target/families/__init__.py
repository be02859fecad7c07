"""Families of targets: each module says how its config.json describes a decoder."""

from collections.abc import Callable

from dump.target.families import gemma, gpt_oss, llama, qwen_moe
from dump.target.fields import Fields
from dump.target.spec import TargetConfig

FAMILIES: dict[str, Callable[[Fields], TargetConfig]] = {
    **gemma.ARCHITECTURES,
    **gpt_oss.ARCHITECTURES,
    **llama.ARCHITECTURES,
    **qwen_moe.ARCHITECTURES,
}
"""Architecture (as config.json names it) -> its description."""
