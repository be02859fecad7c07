"""The config.json of a head, written and read, as SGLang, sglang-jax, EAGLE and vLLM understand it.

What each key is for was read off their loaders: vLLM 0.32, SGLang and sglang-jax `models/llama_eagle3.py`,
SafeAILab/EAGLE `eagle/model/{configs,cnets,ea_model}.py`, transformers 4 and 5 `LlamaConfig`.
"""

from collections.abc import Callable
from typing import Any

from common.errors import EyasError
from train.head import HeadConfig, head_config

DTYPES = ("bfloat16", "float16", "float32")

_FIXED = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "norm_before_residual": False,  # written out: its default differs between the layouts that vLLM reads
}
_SIZES = {  # the key in config.json: the field of HeadConfig
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "draft_vocab_size": "draft_vocab_size",
    "max_position_embeddings": "max_position",
}
_NUMBERS = {"rms_norm_eps": "rms_eps", "rope_theta": "rope_theta"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
AUX_KEY = "eagle_aux_hidden_state_layer_ids"


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """What servers capture (in h_k terms) from a target of n layers when config.json names no layers."""
    return 2, num_layers // 2, num_layers - 3


def serving_config(head: HeadConfig, target: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of a head. `target` is its target's; `dtype` names the weights' type.

    RoPE is written as `rope_theta` and `rope_scaling`, which transformers 5 turns into `rope_parameters` by
    itself. `target_hidden_size` is left out: it defaults to `hidden_size` everywhere, and EAGLE's own code
    skips the target's embedding where it finds the key.
    """
    tokens = {name: target.get(name) for name in _TOKENS}
    if not _is_token(tokens["pad_token_id"], head.vocab_size):
        tokens["pad_token_id"] = None  # -1, say, which EAGLE's embedding refuses
    return {
        **_FIXED,
        **{name: getattr(head, field) for name, field in (_SIZES | _NUMBERS).items()},
        "rope_scaling": canonical_rope(head.rope),
        "torch_dtype": dtype,
        **tokens,
        **_aux_keys(head),
    }


def canonical_rope(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """A `rope_scaling` under its present names (`rope_type`, not `type`); None where nothing is scaled."""
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return None if kind == "default" else {"rope_type": kind, **rest}


def _aux_keys(head: HeadConfig) -> dict[str, Any]:
    """Names the aux layers where they are not the default: vLLM counts h_k, SGLang the layer that made it."""
    if head.aux_layers == default_aux_layers(head.num_target_layers):
        return {}
    return {AUX_KEY: list(head.aux_layers), "eagle_config": {AUX_KEY: [k - 1 for k in head.aux_layers]}}


def read_serving_config(path: str, config: Any, num_target_layers: int) -> HeadConfig:
    """The head that the config.json at `path` describes, for a target of `num_target_layers` layers.

    EyasError for a field that a server needs and that is missing, of another type or of another value.
    """
    _check_fields(path, config)
    aux_layers = _read_aux_layers(path, config) or default_aux_layers(num_target_layers)
    try:
        return HeadConfig(
            **{field: config[name] for name, field in (_SIZES | _NUMBERS).items()},
            target_hidden_size=config["hidden_size"],
            rope=config["rope_scaling"],
            aux_layers=aux_layers,
            num_target_layers=num_target_layers,
        )
    except ValueError as error:
        raise EyasError(f"{path}: {error}; export the head again") from error


def _check_fields(path: str, config: Any) -> None:
    if not isinstance(config, dict):
        raise EyasError(f"{path} is no JSON object; export the head again")
    if "auto_map" in config:
        raise EyasError(f"{path} asks for remote code (auto_map); remove the key")

    def require(name: str, wanted: str, fits: Callable[[Any], bool]) -> None:
        if name not in config or not fits(config[name]):
            found = f"is {config[name]!r}" if name in config else "is missing"
            raise EyasError(f"{path}: {name} {found}, expected {wanted}; export the head again")

    for name, value in _FIXED.items():
        require(name, repr(value), lambda x, value=value: type(x) is type(value) and x == value)
    for name in _SIZES:
        require(name, "a positive integer", lambda x: type(x) is int and x > 0)
    for name in _NUMBERS:
        require(name, "a positive number", lambda x: type(x) in (int, float) and x > 0)
    require("torch_dtype", f"one of {', '.join(DTYPES)}", lambda x: isinstance(x, str) and x in DTYPES)
    require("rope_scaling", "null or an object with rope_type", _is_scaling)
    for name in _TOKENS:
        many = name == "eos_token_id"
        require(name, "null or a token id", lambda x, many=many: _is_token(x, config["vocab_size"], many))
    if "target_hidden_size" in config:
        size = config["hidden_size"]
        require("target_hidden_size", f"the hidden_size {size}", lambda x: x == size)


def _is_token(value: Any, vocab_size: int, many: bool = False) -> bool:
    if many and isinstance(value, list):
        return all(_is_token(one, vocab_size) for one in value)
    return value is None or (type(value) is int and 0 <= value < vocab_size)


def _is_scaling(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and isinstance(value.get("rope_type"), str))


def _read_aux_layers(path: str, config: dict[str, Any]) -> tuple[int, ...] | None:
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
    return tuple(ids)


def limits(head: HeadConfig) -> list[str]:
    """Which servers cannot load this head, and why: one sentence each, [] when all can."""
    found = []
    if head.aux_layers != default_aux_layers(head.num_target_layers):
        found.append(f"sglang-jax and EAGLE's own code cannot take aux layers {list(head.aux_layers)}")
    if len(head.aux_layers) != 3:
        found.append(f"SGLang cannot take {len(head.aux_layers)} aux layers, only three")
    if head.head_dim * head.num_heads != head.hidden_size:
        found.append(
            f"EAGLE's own code cannot take heads of {head.head_dim}: it divides hidden_size "
            f"{head.hidden_size} by {head.num_heads} heads"
        )
    scaling = canonical_rope(head.rope)
    if scaling:
        found.append(f"EAGLE's own code cannot take {scaling['rope_type']} RoPE scaling in this form")
    return found


def require_fit(head: HeadConfig, target: dict[str, Any], where: str) -> None:
    """EyasError naming the first size or RoPE setting of `where` that is not its target's (a config.json)."""
    wanted = head_config(target, head.draft_vocab_size, head.aux_layers, head.ffn)
    for field in ("hidden_size", "vocab_size", "rope_theta", "rope"):
        ours, its = getattr(head, field), getattr(wanted, field)
        if field == "rope":
            ours, its = canonical_rope(ours), canonical_rope(its)
        if ours != its:
            raise EyasError(
                f"{where} has {field} {ours}, its target {its}; give the target it was trained for"
            )
    outside = [k for k in head.aux_layers if not 0 <= k < wanted.num_target_layers]
    if outside or len(set(head.aux_layers)) < len(head.aux_layers):
        raise EyasError(
            f"{where} takes aux layers {list(head.aux_layers)} from a target of {wanted.num_target_layers} "
            "layers; expected different layers of that target"
        )
