"""Kinds of draft heads: each is a package here, behind the protocol of head.py, and known to no other code.

Another kind is its package, a line in `KINDS` and one in `HEADS` of head.py.
"""

from typing import Any

from common.config import knobs
from train.heads.eagle3.settings import Settings as Eagle3Settings

# What can be chosen about each kind, by the names of --kind: dataclasses of settings (common/config.py) that
# become options of `eyas train`. Without jax, for which help would wait.
KINDS: dict[str, type[Any]] = {"eagle3": Eagle3Settings}


def settings_of(kind: str) -> tuple[str, ...]:
    """The names of what can be chosen about a kind."""
    return tuple(knob.name for knob in knobs(KINDS[kind]))
