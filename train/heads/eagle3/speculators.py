"""The config.json of the layout of speculators, which nests what the portable one has at its top.

Read off vllm-project/speculators `models/eagle3/{config,core}.py` and vLLM
`transformers_utils/configs/speculators/{base,algos}.py`.
"""

from typing import Any

from common.errors import EyasError
from train.heads.eagle3.aux_keys import AUX_KEY
from train.heads.eagle3.sizes import METHOD
from train.launch import TOKENS

ARCHITECTURES = ["Eagle3DraftModel"]
EMBEDDING = "embed_tokens.weight"  # speculators' own model has none but this; vLLM shares it with the target
_VERSION = "0.9.0"  # of speculators, whose layout this is
_OUTSIDE = ("draft_vocab_size", "norm_before_residual", "fc_norm", "norm_output")


def write(portable: dict[str, Any], aux: list[int], target: dict[str, Any], verifier: str) -> dict[str, Any]:
    """Of a portable config.json without architectures; `verifier` is the target's folder or Hub id.

    The layers are named also where they are the default. How many they are is among the layer's settings,
    where vLLM, which would size the projection for three, finds it.
    """
    layer = {
        name: value
        for name, value in portable.items()
        if name not in (*_OUTSIDE, AUX_KEY, "eagle_config", "rope_theta", "rope_scaling", "torch_dtype")
    }
    scaling = portable["rope_scaling"] or {"rope_type": "default"}
    return {
        "architectures": ARCHITECTURES,
        "speculators_model_type": METHOD,
        "speculators_version": _VERSION,
        **{name: portable[name] for name in _OUTSIDE},
        "norm_before_fc": False,
        "target_hidden_size": portable["hidden_size"],
        AUX_KEY: aux,
        "tie_word_embeddings": False,
        "torch_dtype": portable["torch_dtype"],
        "speculators_config": {
            "algorithm": METHOD,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": TOKENS,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": verifier, "architectures": target.get("architectures") or []},
        },
        "transformer_layer_config": layer
        | {"rope_parameters": {"rope_theta": portable["rope_theta"], **scaling}},
    }


def read(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """The same in the portable layout, without architectures, its fields as they are. EyasError where nothing
    is nested."""
    layer, aux = config.get("transformer_layer_config"), config.get(AUX_KEY)
    rope = layer.get("rope_parameters") if isinstance(layer, dict) else None
    if not isinstance(layer, dict) or not isinstance(rope, dict) or not isinstance(aux, list):
        raise EyasError(
            f"{path}: transformer_layer_config, its rope_parameters or {AUX_KEY} is missing; export it again"
        )
    if config.get("norm_before_fc") is not False:
        raise EyasError(f"{path}: norm_before_fc is {config.get('norm_before_fc')!r}, expected False")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    nested = {"eagle_config": {AUX_KEY: [k - 1 for k in aux if type(k) is int]}, AUX_KEY: aux}
    outside = {name: config[name] for name in (*_OUTSIDE, "torch_dtype") if name in config}
    return {
        **{name: value for name, value in layer.items() if name != "rope_parameters"},
        **outside,
        **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}),
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        **nested,
    }
