"""Families of targets: each module says how its config.json describes a decoder."""

from collections.abc import Callable

from dump.target.families import llama
from dump.target.fields import Fields
from dump.target.spec import TargetConfig

FAMILIES: dict[str, Callable[[Fields], TargetConfig]] = {**llama.ARCHITECTURES}
"""Architecture (as config.json names it) -> its description."""
