"""Stage configurations are frozen dataclasses, whose fields state default, help and bounds in one place.

A field made by `setting` carries what its command-line option and its check need; a field without one is a
place (a model, a store, a folder) that every caller gives. Here configurations also become JSON, hashes and
differences.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import struct
import types
import typing
from collections.abc import Iterable
from typing import Any

DTYPES = ("float32", "bfloat16")  # of computing
FLOAT8 = "float8_e4m3fn"
INT8 = "int8"
PRECISIONS = (*DTYPES, FLOAT8, INT8)  # of storing
CODECS = ("none", "topk", "draft", "full")  # which logits are stored, see common/codec.py
_LARGEST = 2**31 - 1
_LEAST_FLOAT32 = 2.0**-126  # what is smaller is 0 on a device
DEFAULT_DTYPE = "float32 on CPU, bfloat16 on accelerators"


def _in_float32(value: float | None) -> float | None:
    """The nearest float32, or infinity; None stays. Without NumPy, for which help would wait."""
    try:
        return None if value is None else struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field says about itself besides its type and default.

    A value is at least `least`, at most `most`, more than `above`, less than `below`, and one of `choices`
    where there are any; of a tuple, each of its numbers. A whole number fits in 31 bits in any case, and
    another holds its bounds in float32 too, as which programs take it: 0.999999999 is 1 there. What is 0
    there, and was not, is refused as well.
    `otherwise` says in words what None stands for.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    otherwise: str = ""

    def problem(self, value: Any, kind: Any) -> str:
        """What is wrong with a value of the type `kind`, behind 'name=value'; empty if nothing is."""
        if typing.get_origin(kind) is tuple:
            items = typing.get_args(kind)
            fixed = None if items[-1] is Ellipsis else len(items)
            if isinstance(value, tuple) and value and len(value) == (fixed or len(value)):
                return next(filter(None, (self.problem(item, items[0]) for item in value)), "")
            return f"must be {fixed or 'some'} {'names' if items[0] is str else 'numbers'}"
        if self.choices:
            return "" if value in self.choices else f"is unknown; use one of {', '.join(self.choices)}"
        if kind in (int, float):
            largest = self.largest(kind)
            good = _is(value, kind) and self._holds(value, largest)
            if good and (kind is int or self._holds_in_float32(value)):
                return ""
            where = ", in float32 as well" if good else ""
            return f"must be {_NAMES[kind]}{self._bounds(value, largest)}{where}"
        return "" if _is(value, kind) else f"must be {_NAMES[kind]}"

    def largest(self, kind: Any) -> float | None:
        """The largest value of that kind, None where there is none."""
        return _LARGEST if self.most is None and kind is int else self.most

    def _holds(self, value: float, largest: float | None) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (largest is None or value <= largest)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _holds_in_float32(self, value: float) -> bool:
        bounds = {name: _in_float32(getattr(self, name)) for name in ("least", "most", "above", "below")}
        rounded = _in_float32(value)
        if abs(rounded) < _LEAST_FLOAT32:
            rounded = 0.0
        if value and not rounded:
            return False
        return math.isfinite(rounded) and dataclasses.replace(self, **bounds)._holds(rounded, bounds["most"])

    def _bounds(self, value: Any, largest: float | None) -> str:
        is_number = type(value) in (int, float)
        beyond = largest if is_number and largest is not None and value > largest else None
        least, most = ("of at least", self.least), ("of at most", beyond)
        words = (least, most, ("above", self.above), ("below", self.below))
        return " and".join(f" {word} {bound:.10g}" for word, bound in words if bound is not None)


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text, and not empty"}


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """A dataclass field with that default, the help of its option, and the bounds of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **bounds)})


@dataclasses.dataclass(frozen=True)
class Knob:
    """A field that has a setting. `kind` is its type without None."""

    name: str
    kind: Any
    default: Any
    setting: Setting


def knobs(config: type) -> list[Knob]:
    """The fields of a configuration class that have a setting, in order; inherited ones behind its own."""
    kinds, own = typing.get_type_hints(config), inspect.get_annotations(config)
    found = [field for field in dataclasses.fields(config) if "setting" in field.metadata]
    found.sort(key=lambda field: field.name not in own)
    return [Knob(f.name, _without_none(kinds[f.name]), f.default, f.metadata["setting"]) for f in found]


def given(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of the named fields that do not hold their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}


def require_with(config: Any, name: str, other: str, value: Any) -> None:
    """ValueError if the field `name` is set, and would do nothing because `other` is not `value`."""
    if given(config, [name]) and getattr(config, other) != value:
        raise ValueError(
            f"{name}={getattr(config, name)} has no meaning with {other}={getattr(config, other)}; leave it "
            f"out, or give {other}={value}"
        )


def check(config: Any) -> None:
    """ValueError that names the field, its value and what it must be, unless all fields hold what they state.

    Called by a configuration's `__post_init__`. Lists (of TOML) become tuples and whole numbers floats where
    the field has that type. A text field without a setting must not be empty.
    """
    known = knobs(type(config))
    for knob in known:
        value = getattr(config, knob.name)
        if value is None and knob.default is None:
            continue
        value = _converted(value, knob.kind)
        object.__setattr__(config, knob.name, value)
        if problem := knob.setting.problem(value, knob.kind):
            raise ValueError(f"{knob.name}={value!r} {problem}")
    kinds = typing.get_type_hints(type(config))
    for name in kinds.keys() - {knob.name for knob in known}:
        value = getattr(config, name)
        if kinds[name] is str and not _is(value, str):
            raise ValueError(f"{name}={value!r} must be a folder or URL, and not empty")


def _is(value: Any, kind: type) -> bool:
    """True for a value of exactly that kind: no bool is a number, no number infinite, no text empty."""
    if kind is float and isinstance(value, float):
        return math.isfinite(value)
    return type(value) is kind and value != ""


def _converted(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_converted(item, typing.get_args(kind)[0]) for item in value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    return kind


def to_json(value: Any) -> Any:
    """Plain JSON of a (nested) dataclass: tuples become lists, dataclasses become objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return value


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`: sorted keys, no spaces."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Every leaf at which two JSON values differ, as 'field: OLD there, NEW here'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {_short(old)} there, {_short(new)} here"]


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
