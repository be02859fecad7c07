"""Stage configurations are frozen dataclasses; here they become JSON, hashes and differences."""

import dataclasses
import hashlib
import json
from typing import Any


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
