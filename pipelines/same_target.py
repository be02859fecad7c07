"""A store's features must be of the target that a command names."""

import os

from common import storage
from common.config import digest
from common.errors import EyasError
from common.store import Store
from pipelines.recipes import named


def require_same_target(store: str, model: str) -> None:
    """EyasError if the store's features are of another model than MODEL, as far as that can be told here."""
    opened, recipe = Store.open(store), named(model)
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
