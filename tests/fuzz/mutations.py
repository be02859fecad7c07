"""Strategies of files that are almost right: another value at one place, another document, damaged bytes.

What a file was comes from a function, because hypothesis spells out the arguments of strategies.
"""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

_NUMBERS = [0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-320, 1e308, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400]
_TEXTS = ["", "0", "5", "a", "../x", "/etc/passwd", "a\0b", "\ud800", "é" * 99, "float32", "{{ 1 / 0 }}"]
_LISTS = [[], [[]], [None], [0], [1, 2], [2**40] * 40, ["a"], [[1], [2]]]
_OBJECTS = [{}, {"": {}}, {"a": 1}, {"type": "yarn"}, {"rope_type": []}, {"factor": 0}, {"quant_method": {}}]
_OTHERS = [None, True, False, *(float(name) for name in ("nan", "inf", "-inf"))]
_ODD = [*_NUMBERS, *_TEXTS, *_LISTS, *_OBJECTS, *_OTHERS]
_DEEP = [b"[" * n + b"]" * n for n in (70, 5_000, 200_000)]
_SHORT = [b"", b"[]", b"{}", b"5", b"null", b'"a"', b"NaN", b"{", b"[1,", b"\xff\xfe", b"\0", b"[{}]"]
_KINDS = ["value"] * 6 + ["two values"] * 2 + ["gone", "added", "renamed", "bytes", "document"]
_leaves = st.sampled_from(_ODD) | st.integers() | st.floats() | st.text(max_size=8)
_objects = st.dictionaries(st.text(max_size=6), _leaves, max_size=4)
json_values = _leaves | st.lists(_leaves, max_size=4) | _objects


def paths(value: Any, prefix: tuple = (), limit: int = 3) -> Iterator[tuple]:
    """The ways to every part of a JSON value, `()` left out; of long lists the first parts."""
    if isinstance(value, list):
        value = dict(enumerate(value[:limit]))
    for name, part in value.items() if isinstance(value, dict) else ():
        yield (*prefix, name)
        yield from paths(part, (*prefix, name), limit)


@st.composite
def documents(draw: Callable, original: Callable[[], Any], names: tuple[str, ...] = ()) -> bytes:
    """A JSON file that was `original()`; fields called `names` are also put in where they are missing."""
    kind = draw(st.sampled_from(_KINDS))
    if kind == "document":
        return draw(st.sampled_from([*_SHORT, *_DEEP]) | st.binary(max_size=40))
    if kind == "bytes":
        return draw(damaged(lambda: _dump(original())))
    value = copy.deepcopy(original())
    for _ in range(2 if kind == "two values" else 1):
        if isinstance(value, dict) and (kind == "added" or not value):
            value |= {draw(st.sampled_from([*names, "a"])): copy.deepcopy(draw(json_values))}
            continue
        *way, last = draw(st.sampled_from(list(paths(value))))
        place = value
        for name in way:
            place = place[name]
        if kind in ("gone", "renamed"):
            found = place.pop(last)
            if kind == "renamed" and isinstance(place, dict):
                place[f"{last}_"] = found
        else:
            place[last] = copy.deepcopy(draw(st.sampled_from(_ODD) | json_values))
    return _dump(value)


@st.composite
def damaged(draw: Callable, source: Callable[[], bytes]) -> bytes:
    """The bytes of `source()` cut off, with a byte changed, or with others in between."""
    data = source()
    at = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(["cut", "flip", "insert"]))
    if kind == "cut":
        return data[:at]
    return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at + (kind == "flip") :]


@st.composite
def safetensors(draw: Callable, source: Callable[[], bytes]) -> bytes:
    """The safetensors file `source()` with another header, header length or end."""
    data = source()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw(st.sampled_from(["header"] * 6 + ["length", "cut"]))
    if kind == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    if kind == "cut":
        return data[: draw(st.integers(0, len(data)))]
    new = draw(documents(lambda: header))
    return len(new).to_bytes(8, "little") + new + rest


def _dump(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
