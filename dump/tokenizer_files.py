"""A model folder's tokenizer, chat template and stop tokens, loaded by `transformers`; no code is run."""

import hashlib
import os
import tempfile
from typing import Any

from common import schema, storage
from common.errors import EyasError
from common.texts import first_line

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


class _Named(schema.TypedDict):
    name: str
    template: str


class _Settings(schema.TypedDict):
    """What is read of a tokenizer_config.json here; transformers reads more."""

    chat_template: schema.NotRequired[str | list[_Named] | dict[str, str] | None]


def tokenizer_hash(folder: str) -> str:
    """sha256 (hex) of a model folder's tokenizer.json, or of the files it would be made from.

    EyasError if the folder or its tokenizer is missing.
    """
    if not storage.exists(folder):
        raise EyasError(f"the model folder {folder} does not exist; give a Hugging Face model folder")
    names = [name for name in _TOKENIZER_FILES if storage.exists(storage.join(folder, name))]
    if not names:
        raise EyasError(f"{folder} has no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}")
    digest = hashlib.sha256()
    for name in names[:1] if names[0] == "tokenizer.json" else names:
        digest.update(storage.read_bytes(storage.join(folder, name)))
    return digest.hexdigest()


def load_tokenizer(folder: str) -> Any:
    """transformers' tokenizer of a folder (local, or a URL, whose small files are copied).

    EyasError if it is damaged or asks for code of its own.
    """
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory() as copy:
            for name in storage.list_names(folder):
                if name.endswith(_SMALL_FILES) and not name.endswith(".index.json"):
                    storage.write_bytes(
                        storage.join(copy, name), storage.read_bytes(storage.join(folder, name))
                    )
            return _load_local(copy, folder)
    return _load_local(storage.local_path(folder), folder)


def template_of(tokenizer: Any, folder: str) -> str:
    """The text of the chat template; of several the one named `default`. EyasError if there is none."""
    given = tokenizer.chat_template
    if isinstance(given, dict) and given:
        name = "default" if "default" in given else next(iter(given))
        if name != "default" and len(given) > 1:
            raise EyasError(
                f"{folder} has several chat templates ({', '.join(sorted(given))}) and none named default; "
                "write the one to use into chat_template.jinja and remove the others"
            )
        given = given[name]
    if not given:
        raise EyasError(
            f"{folder} has no chat template; add chat_template.jinja, or use the instruction-tuned model"
        )
    if not isinstance(given, str):
        raise EyasError(
            f"the chat template of {folder} is of the type {type(given).__name__}; expected a text"
        )
    return given


def stop_tokens(folder: str) -> frozenset[int]:
    """The tokens at which a server stops: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = storage.join(folder, name)
        found = storage.read_object(path).get("eos_token_id") if storage.exists(path) else None
        found = found if isinstance(found, list) else [found]
        stops = frozenset(i for i in found if isinstance(i, int) and not isinstance(i, bool))
        if stops:
            return stops
    return frozenset()


def _load_local(path: str, shown: str) -> Any:
    config = os.path.join(path, "tokenizer_config.json")
    if storage.exists(config):
        settings = schema.read(_Settings, config, "restore it from where the model is published")
        if "auto_map" in settings:
            raise EyasError(
                f"{shown}/tokenizer_config.json asks to run code of its own (auto_map), which is never done; "
                "use a folder whose tokenizer.json stands alone and remove auto_map"
            )
    for name in storage.list_names(path):
        storage.require_no_device(os.path.join(path, name))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises plain Exception for a damaged file
        raise EyasError(f"the tokenizer of {shown} cannot be loaded: {first_line(error)}") from None
