"""What made the answers is recorded beside them, in NAME.settings.json; another run is refused."""

import os
from typing import Any, Literal

from common import schema, storage
from common.config import differences
from common.errors import EyasError
from common.schema import TypedDict

SUFFIX = ".settings.json"
_ADVICE = "restore it, or name another --out"


def place(out: str) -> str:
    """Where the record of the file of answers `out` is."""
    return out.removesuffix(".jsonl") + SUFFIX


class _Record(TypedDict):
    """`settings`: all that decides about the answers; `endpoints` have no part in that."""

    schema: Literal[1]
    settings: dict[str, Any]
    endpoints: list[str]
    complete: bool


class Record:
    """The record of the file of answers `out`."""

    def __init__(self, out: str, settings: dict[str, Any], endpoints: tuple[str, ...]) -> None:
        """EyasError if there are answers of other settings, or of none that are known."""
        self._place = place(out)
        self._value = {"schema": 1, "settings": settings, "endpoints": list(endpoints), "complete": False}
        if not storage.exists(out) or not storage.size(out):
            return
        if storage.exists(self._place):
            old = schema.read(_Record, self._place, _ADVICE)
            different = differences(old["settings"], settings)
            if different:
                raise EyasError(
                    f"{out} was answered in another way: {'; '.join(different)}; name another --out, or "
                    "delete it"
                )
        else:
            raise EyasError(f"{out} is there, without {os.path.basename(self._place)}; name another --out")

    def write(self, **found: Any) -> None:
        """Writes the record with what was found, its `complete` among it."""
        storage.write_json(self._place, self._value | found)
