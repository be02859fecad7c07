"""A measurement's file takes the place of nothing that was read, and no figure is lost for want of it."""

import json
from collections.abc import Iterable
from typing import Any

from common import storage
from common.errors import EyasError
from common.progress import note
from dump.data_files import require_apart


def require_place(out: str, data: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """EyasError if `out` cannot be a file to write, would be found as `data`, or lies in one of `folders`."""
    storage.require_file(out)
    require_apart(data, (out,))
    for folder in folders:
        if storage.is_inside(out, folder):
            raise EyasError(f"{out} is in {folder}, which is read only; name another place for the figures")


def write(out: str, found: dict[str, Any]) -> None:
    """Writes the figures, which may have taken hours: where that fails, as on a full disk, they are told on
    stderr, and EyasError is raised."""
    try:
        storage.write_json(out, found)
    except EyasError:
        note(f"the figures, which could not be written: {json.dumps(found)}")
        raise
