"""Kinds of draft heads: each is a package here, behind the protocol of head.py, and known to no other code.

Another kind is its package, a line in `KINDS` and one in `HEADS` of head.py.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from common.config import Knob, knobs
from train.heads.eagle3.settings import Settings as Eagle3Settings

# What can be chosen about each kind, by the names of --kind: dataclasses of settings (common/config.py) that
# become options of `eyas train`, and one option where two kinds have one of a name. Without jax, for which
# help would wait.
KINDS: dict[str, type[Any]] = {"eagle3": Eagle3Settings}


def settings_of(kind: str) -> tuple[str, ...]:
    """The names of what can be chosen about a kind."""
    return tuple(knob.name for knob in knobs(KINDS[kind]))


def chosen(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All that can be chosen about a kind: what is given, and else the default."""
    return {knob.name: given.get(knob.name, knob.default) for knob in knobs(KINDS[kind])}


def require_apart(kinds: Mapping[str, type[Any]], others: type[Any]) -> None:
    """ValueError if a name means two things: settings of one name in two kinds, which are one option, must be
    the same, and none may be that of a setting in `others`."""
    own = inspect.get_annotations(others)
    known: dict[str, tuple[str, Knob]] = {}
    for kind, settings in kinds.items():
        for knob in knobs(settings):
            if knob.name in own:
                raise ValueError(f"{knob.name} of kind={kind} is a setting of all kinds; name it otherwise")
            other, same = known.setdefault(knob.name, (kind, knob))
            if knob != same:
                raise ValueError(
                    f"{knob.name} of kind={kind} is one option with that of kind={other}, and not the same; "
                    "give both the same type, default, help and bounds, or other names"
                )
