"""JSON by the standard and no further, so that what is read can be hashed, compared and written again."""

import json
import math
from typing import Any

from common.errors import EyasError

_LEVELS = 64  # beyond any file that a model or a store has


def parse(data: bytes, where: str) -> Any:
    """The JSON value of a file's bytes. EyasError naming `where` if they are not JSON by the standard.

    Refused are NaN and numbers beyond float64, a name that an object has twice, text that is no Unicode, and
    values nested deeper than any that Eyas knows.
    """
    try:
        text = data.decode("utf-8-sig")  # given bytes, json takes other encodings, and halves of characters
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_no_name_twice
        )
        if data.count(b"[") + data.count(b"{") > _LEVELS:
            _require_shallow(value)
        if b"\\u" in data:  # an escape can spell half of a character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise EyasError(f"{where} is nested too deeply to be JSON of ours; restore it") from None
    except ValueError as error:
        raise EyasError(
            f"{where} is not JSON ({error}); it was cut off or edited by hand: restore it"
        ) from None
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is named twice")
    return found


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_LEVELS):
        inner = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in inner if isinstance(item, dict | list)]
    if level:
        raise RecursionError
