"""What a config.json leaves out is what transformers' configuration class of the model has in its place."""

import copy
import os
from typing import Any

from common.errors import EyasError
from dump.target.fields import Fields
from dump.target.schema import ConfigJson, Positive

_OURS = {"architectures", "auto_map", "quantization_config", "text_config"}  # not of the class
_OURS |= {"bos_token_id", "eos_token_id", "pad_token_id"}  # the tokenizer says which they are
_FIELDS = {name: kind for name, kind in ConfigJson.__annotations__.items() if name not in _OURS}


def complete(fields: Fields, model_type: str) -> None:
    """Puts the class's values in the place of what `fields` lacks; `rope_parameters` is always the class's.

    Only fields that we know are given to the class and taken from it. EyasError where the class refuses the
    file or where servers would read it in two ways.
    """
    _check_rope(fields)
    # Of plain numbers the class derives nothing; as integers, which some files have, it would refuse them.
    given = {n: v for n, v in fields.found.items() if _FIELDS.get(n, Positive) is not Positive}
    class_fields = _class_fields(model_type, given, fields.where)
    missing = {n: v for n, v in class_fields.items() if n in _FIELDS and fields.found.get(n) is None}
    fields.raw = fields.found | missing | {"rope_parameters": class_fields["rope_parameters"]}


def _class_fields(model_type: str, given: dict[str, Any], where: str) -> dict[str, Any]:
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns about is refused here, or does not matter here
    try:
        return CONFIG_MAPPING[model_type](**copy.deepcopy(given)).to_dict()
    except Exception as error:  # of whatever kind: the class computes with what a person wrote
        while error.__cause__:
            error = error.__cause__
        told = " ".join(str(error.args[0] if error.args else error).split()).rstrip(".")
        raise EyasError(f"{where}: {told or type(error).__name__}; correct config.json") from None
    finally:
        logging.set_verbosity(level)


def _check_rope(fields: Fields) -> None:
    """EyasError if RoPE is said twice and differently: what reads the file takes the one or the other."""
    old, new = fields.get("rope_scaling", None), fields.get("rope_parameters", None)
    if old and new and old != new:
        raise EyasError(
            f"{fields.where}: rope_scaling and rope_parameters differ; remove the one that is wrong"
        )
    theta, inner = fields.get("rope_theta", None), (new or old or {}).get("rope_theta")
    if None not in (theta, inner) and theta != inner:
        raise EyasError(
            f"{fields.where}: rope_theta is {theta} and, beside the scaling, {inner}; remove the wrong one"
        )
