"""What is checked between the stages: that a head, a store and a target belong together."""

import os

from common import storage
from common.config import digest
from common.errors import EyasError
from common.storage import write_folder
from common.store import Store
from pipelines.recipes import Recipe
from train.check_export import check

_HEAD_FILES = ("config.json", "model.safetensors", "README.md")


def require_same_target(store: str, model: str, recipe: Recipe | None) -> None:
    """EyasError if the store's features are of another model than MODEL, as far as that can be told here."""
    opened = Store.open(store)
    if recipe is None:
        if os.path.isdir(model):
            opened.require_target(digest(storage.read_json(storage.join(model, "config.json"))))
        return
    target = opened.features["target"]
    for name in ("architecture", "layers", "hidden_size", "vocab_size"):
        if target[name] != getattr(recipe, name):
            raise EyasError(
                f"{store} holds features of another model ({target['name']}: {name} {target[name]}) than "
                f"{recipe.name} ({name} {getattr(recipe, name)}); name that model or another store"
            )


def copy_head(head: str, target_config: dict, out: str) -> list[str]:
    """Checks the folder `head` against its target, writes the same files to `out` and checks those.

    Returns what the check found, a line each. EyasError, with nothing written, if `head` is not sound.
    """
    check(head, target_config)
    names = [name for name in _HEAD_FILES if storage.exists(storage.join(head, name))]
    write_folder(out, {name: storage.read_bytes(storage.join(head, name)) for name in names})
    return [f"{out}: written and checked", *(f"  {line}" for line in check(out, target_config))]
