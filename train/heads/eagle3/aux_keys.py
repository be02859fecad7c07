"""The aux layers of an EAGLE3 head in config.json, where two servers count them in two ways."""

from typing import Any

from common.aux_layers import is_default
from common.errors import EyasError

AUX_KEY = "eagle_aux_hidden_state_layer_ids"
_AUX_COUNT = "num_aux_hidden_states"  # by which servers size the projection; 3 where it is missing
_USUAL_AUX = 3


def aux_keys(aux_layers: tuple[int, ...], num_target_layers: int) -> dict[str, Any]:
    """Names the aux layers where they are not the default: vLLM counts h_k, SGLang the layer that made it."""
    if is_default(aux_layers, num_target_layers):
        return {}
    found = {AUX_KEY: list(aux_layers), "eagle_config": {AUX_KEY: [k - 1 for k in aux_layers]}}
    return found if len(aux_layers) == _USUAL_AUX else found | {_AUX_COUNT: len(aux_layers)}


def read_aux_layers(path: str, config: dict[str, Any]) -> tuple[int, ...] | None:
    """The aux layers in h_k terms, None for the default; both servers' keys must be there and agree."""
    ids, nested = config.get(AUX_KEY), config.get("eagle_config")
    nested_ids = nested.get(AUX_KEY) if isinstance(nested, dict) else None
    if ids is None and nested_ids is None:
        return None
    if not isinstance(ids, list) or not ids or any(type(k) is not int for k in ids):
        raise EyasError(f"{path}: {AUX_KEY} is {ids}, expected a list of layers; export the head again")
    if nested_ids != [k - 1 for k in ids]:
        raise EyasError(
            f"{path}: eagle_config.{AUX_KEY} is {nested_ids}, expected {[k - 1 for k in ids]} beside "
            f"{AUX_KEY} {ids} (SGLang counts from the layer before); export the head again"
        )
    if config.get(_AUX_COUNT, _USUAL_AUX) != len(ids):
        raise EyasError(
            f"{path}: {_AUX_COUNT} is {config.get(_AUX_COUNT, 'missing')}, expected {len(ids)}, as many as "
            f"{AUX_KEY}; export the head again"
        )
    return tuple(ids)
