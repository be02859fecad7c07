"""config.json becomes a TargetConfig, or a refusal that names what is not supported."""

from dataclasses import replace
from typing import Any

from common import storage
from common.errors import EyasError
from dump.target.families import FAMILIES, PUBLISHED_WITH_CODE
from dump.target.fields import Fields
from dump.target.moe import split_experts
from dump.target.quant import quantise
from dump.target.spec import TargetConfig


def read_config(folder: str, experts: str | None = None, dequantise: bool = False) -> TargetConfig:
    """The target that `folder/config.json` describes (local or any fsspec URL).

    `experts` ("ffn" or "expert") says how a mesh divides them, else the family does; with `dequantise`,
    quantised weights become plain when they are loaded.

    EyasError: no config.json, remote code, an unknown architecture (the known ones are listed), a field
    that would change the result and is not implemented.
    """
    where = f"{folder.rstrip('/')}/config.json"
    if not storage.exists(where):
        raise EyasError(f"{where} is missing; give a Hugging Face model folder with config.json")
    raw = storage.read_json(where)
    if not isinstance(raw, dict):
        raise EyasError(f"{where} is not a JSON object; give a Hugging Face model folder")
    found = raw.get("architectures") or ["none"]
    if raw.get("auto_map") and found[0] not in PUBLISHED_WITH_CODE:
        raise EyasError(
            f"{where} has auto_map: the model brings its own code, which is never run; "
            "use a model that needs none"
        )
    if found[0] not in FAMILIES:
        raise EyasError(
            f"{where}: architecture {found[0]} is not supported; give a model of one that is supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    fields = Fields(raw, where)
    fields.skip("auto_map", "quantization_config")
    config = FAMILIES[found[0]](fields)
    fields.finish()
    quantisation = raw.get("quantization_config") or _modelopt(folder)
    config = quantise(config, quantisation, where) if quantisation else config
    config = split_experts(config, experts) if experts else config
    return replace(config, dequantise=dequantise)


def _modelopt(folder: str) -> dict[str, Any] | None:
    """What older modelopt checkpoints say in a file of its own, in place of `quantization_config`."""
    where = f"{folder.rstrip('/')}/hf_quant_config.json"
    if not storage.exists(where):
        return None
    return {"quant_method": "modelopt"} | storage.read_json(where).get("quantization", {})
