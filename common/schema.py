"""The shape of a JSON file is declared once, as a TypedDict, and checked where the file is read.

What is read stays the plain value that it was, fields that are not declared included; pydantic compares it
with the declaration, and what it finds becomes one line.
"""

import functools
import json
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own lacks what pydantic needs before Python 3.12

from common import storage
from common.errors import EyasError

__all__ = ["Count", "Crc32", "FileName", "NotRequired", "Sha256", "Size", "TypedDict", "check", "read"]

Kind = TypeVar("Kind")
Count = Annotated[int, Field(ge=0, le=2**53)]  # what every JSON reader holds exactly
Size = Annotated[int, Field(ge=1, le=2**53)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)
]  # of no other folder
_SHOWN = 80  # characters of a wrong value


def read(kind: type[Kind], url: str, advice: str) -> Kind:
    """The file's JSON value; EyasError if it is missing, is not JSON, or is not as `kind` declares it."""
    return check(kind, storage.read_json(url), url, advice)


def check(kind: type[Kind], value: Any, where: str, advice: str) -> Kind:
    """`value` itself. EyasError naming `where` and the first field that is not as `kind` declares it; a
    number is never taken for text, nor a text or true for a number.
    """
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise EyasError(f"{where} has no {field}; {advice}") from None
        found = f"{field} is {_shown(first['input'])}" if field else f"it holds {_shown(first['input'])}"
        expected = first["msg"][0].lower() + first["msg"][1:]
        raise EyasError(f"{where}: {found}, but {expected}; {advice}") from None
    return value


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "a value of too many levels"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
