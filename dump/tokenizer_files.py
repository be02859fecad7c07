"""A model folder's tokenizer, chat template and stop tokens, loaded by `transformers`; no code is run."""

import hashlib
import json
import os
import tempfile
from typing import Any

from common import storage
from common.errors import EyasError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_SMALL_FILES = (".json", ".jinja", ".model", ".txt")


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
    if isinstance(given, dict):
        if "default" not in given:
            names = ", ".join(sorted(map(str, given))) or "none"
            raise EyasError(
                f"{folder} has several chat templates ({names}) and none named default; write the one to use "
                "into chat_template.jinja and remove the others"
            )
        given = given["default"]
    if given is None or given == "":
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
        settings = storage.read_json(path) if storage.exists(path) else {}
        found = settings.get("eos_token_id") if isinstance(settings, dict) else None
        found = found if isinstance(found, list) else [found]
        stops = frozenset(i for i in found if isinstance(i, int) and not isinstance(i, bool))
        if stops:
            return stops
    return frozenset()


def _load_local(path: str, shown: str) -> Any:
    config = os.path.join(path, "tokenizer_config.json")
    if storage.exists(config):
        settings = storage.read_json(config)
        if not isinstance(settings, dict):
            raise EyasError(
                f"{shown}/tokenizer_config.json holds no object; it was damaged or edited by hand"
            )
        if "auto_map" in settings:
            raise EyasError(
                f"{shown}/tokenizer_config.json asks to run code of its own (auto_map), which is never done; "
                "use a folder whose tokenizer.json stands alone and remove auto_map"
            )
        _require_template(settings.get("chat_template"), shown)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `tokenizers` raises plain Exception for a damaged file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise EyasError(f"the tokenizer of {shown} cannot be loaded: {lines[0][:200]}") from None


def _require_template(given: Any, shown: str) -> None:
    """EyasError unless a chat_template of tokenizer_config.json is a text or a list of named texts."""
    named = isinstance(given, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str)
        for t in given
    )
    if given is None or isinstance(given, str) or named:
        return
    if isinstance(given, dict) and all(isinstance(text, str) for text in given.values()):
        return
    raise EyasError(
        f"chat_template in {shown}/tokenizer_config.json is {json.dumps(given)[:40]}; expected a text, or a "
        "list of objects with a name and a template"
    )
