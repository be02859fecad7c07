"""STORE/target: all that a train job needs of the target, so that it never reads the target's checkpoint."""

from collections.abc import Callable
from typing import Any

from common import safetensors, storage
from common.checked import sha256
from common.errors import EyasError
from common.progress import note
from common.store import Store, tensor_file
from dump.plan import Plan
from dump.target.weights import stacks

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def target_files(plan: Plan) -> dict[str, bytes]:
    """The files by name: embed_tokens and (where it is not tied) lm_head [V, H] in the checkpoint's dtype,
    the text decoder's config.json, and those of the tokenizer."""
    model = plan.config.model
    note(f"dump: reading embeddings, output head and tokenizer of {model}")
    source, declared = safetensors.Checkpoint.open(model), stacks(plan.target, plan.config.tp)
    tensors = ("embed_tokens",) if plan.target.tied else ("embed_tokens", "lm_head")
    files = {
        tensor_file(name): safetensors.to_bytes({name: source.read(declared[name].weight.source)})
        for name in tensors
    }
    files["config.json"] = storage.json_bytes(plan.target.text)
    for name in _TOKENIZER:
        if storage.exists(storage.join(model, name)):
            files[name] = storage.read_bytes(storage.join(model, name))
    return files


def with_sums(features: dict[str, Any], files: Callable[[], dict[str, bytes]]) -> dict[str, Any]:
    """The manifest's section with the sums of target/, those of `files` where it has none yet."""
    if "target_files" in features:
        return features
    return features | {"target_files": {name: sha256(data) for name, data in files().items()}}


def write_target(store: Store, files: Callable[[], dict[str, bytes]]) -> None:
    """Writes what of target/ is missing or damaged; `files` are read only then.

    EyasError if the model's files are no longer those that the manifest names.
    """
    wanted = store.features["target_files"]
    damaged = [name for name in wanted if not _is_sound(store, name)]
    for name in damaged:
        place, data = f"{store.url}/target/{name}", files().get(name)
        if data is None or sha256(data) != wanted[name]:
            raise EyasError(
                f"{place} is to be written, but the model's {name} has changed since this store was begun; "
                "restore it, or dump into a new store"
            )
        storage.write_bytes(place, data)


def _is_sound(store: Store, name: str) -> bool:
    try:
        store.target_file(name)
    except EyasError:
        return False
    return True
