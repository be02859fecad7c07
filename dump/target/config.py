"""config.json becomes a TargetConfig, or a refusal that names what is not supported."""

from dataclasses import replace
from typing import Any

from common import schema, storage
from common.errors import EyasError
from dump.target.families import FAMILIES, PUBLISHED_WITH_CODE
from dump.target.fields import Fields
from dump.target.moe import split_experts
from dump.target.quant import quantise
from dump.target.quant_config import read_quantisation
from dump.target.schema import QuantisationFile
from dump.target.spec import TargetConfig


def read_config(folder: str, experts: str | None = None, dequantise: bool = False) -> TargetConfig:
    """The target that `folder/config.json` describes (local or any fsspec URL).

    `experts` ("ffn" or "expert") says how a mesh divides them, else the family does; with `dequantise`,
    quantised weights become plain when they are loaded. What the file leaves out is what transformers'
    configuration class of the model has in its place.

    EyasError: no config.json, a field of another type, remote code, an unknown architecture (the known ones
    are listed), a field that would change the result and is not implemented.
    """
    where = f"{folder.rstrip('/')}/config.json"
    if not storage.exists(where):
        raise EyasError(f"{where} is missing; give a Hugging Face model folder with config.json")
    fields = Fields(storage.read_json(where), where)
    architecture = (fields.get("architectures", None) or ["none"])[0]
    if fields.get("auto_map", None) and architecture not in PUBLISHED_WITH_CODE:
        raise EyasError(
            f"{where} has auto_map: the model brings its own code, which is never run; "
            "use a model that needs none"
        )
    if architecture not in FAMILIES:
        raise EyasError(
            f"{where}: architecture {architecture} is not supported; give a model of one that is supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    config = FAMILIES[architecture](fields)
    quantisation = fields.get("quantization_config", None)
    fields.finish()
    found = (quantisation, f"{where} (quantization_config)") if quantisation else _modelopt(folder)
    config = _quantised(config, *found) if found else config
    config = split_experts(config, experts) if experts else config
    return replace(config, dequantise=dequantise)


def _quantised(config: TargetConfig, raw: dict[str, Any], where: str) -> TargetConfig:
    scheme, left_out = read_quantisation(raw, where)
    try:
        return quantise(config, scheme, left_out)
    except EyasError as error:
        raise EyasError(f"{where}: {error}") from None


def _modelopt(folder: str) -> tuple[dict[str, Any], str] | None:
    """What older modelopt checkpoints say in a file of its own, in place of `quantization_config`."""
    where = f"{folder.rstrip('/')}/hf_quant_config.json"
    if not storage.exists(where):
        return None
    found = schema.read(QuantisationFile, where, "correct the file, or fetch it again")
    if not found.get("quantization"):
        return None
    return {"quant_method": "modelopt"} | found["quantization"], where
