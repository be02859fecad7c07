"""A head's folder, checked against its target, is written to another place and checked there."""

from common import storage
from common.folders import write_folder
from train.check_export import check

_FILES = ("model.safetensors", "README.md", "config.json")  # the last one makes the folder whole


def copy_head(head: str, target_config: dict, out: str, servers: tuple[str, ...] = ()) -> list[str]:
    """Checks the folder `head` against its target, writes the same files to `out` and checks those.

    Returns what the check found, a line each. EyasError, with nothing written, if `head` is not sound, or one
    of `servers`, keys of serving_config.SERVERS, cannot take it.
    """
    check(head, target_config, servers)
    names = [name for name in _FILES if storage.exists(storage.join(head, name))]
    write_folder(out, {name: storage.read_bytes(storage.join(head, name)) for name in names})
    return [f"{out}: written and checked", *(f"  {line}" for line in check(out, target_config))]
