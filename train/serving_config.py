"""What the servers' config.json of any head has: types, tokens, RoPE; written and checked.

What each key is for was read off their loaders: vLLM 0.32, SGLang and sglang-jax `models/llama_eagle3.py`,
SafeAILab/EAGLE `eagle/model/{configs,cnets,ea_model}.py`, transformers 4 and 5 `LlamaConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from common.errors import EyasError

DTYPES = ("bfloat16", "float16", "float32")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def token_ids(target: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The special tokens of a target's config.json, as a head's has them."""
    tokens = {name: target.get(name) for name in _TOKENS}
    if not _is_token(tokens["pad_token_id"], vocab_size):
        tokens["pad_token_id"] = None  # -1, say, which EAGLE's embedding refuses
    return tokens


def canonical_rope(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """A `rope_scaling` under its present names (`rope_type`, not `type`); None where nothing is scaled."""
    if not scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return None if kind == "default" else {"rope_type": kind, **rest}


def require_dtype(path: str, config: dict[str, Any]) -> None:
    """EyasError unless a head's config.json says what its weights are in."""
    found = config.get("torch_dtype", "missing")
    if not isinstance(found, str) or found not in DTYPES:
        raise EyasError(
            f"{path}: torch_dtype is {found!r}, expected one of {', '.join(DTYPES)}; export the head again"
        )


def check_fields(
    path: str,
    config: dict[str, Any],
    fixed: Mapping[str, Any],
    sizes: Mapping[str, str],
    numbers: Mapping[str, str],
    flags: Mapping[str, str],
) -> None:
    """EyasError unless config.json has what servers need: `fixed` values, positive integers under the keys of
    `sizes`, positive numbers under those of `numbers`, true or false under those of `flags`, and the rest in
    its types."""
    if "auto_map" in config:
        raise EyasError(f"{path} asks for remote code (auto_map); remove the key")

    def require(name: str, wanted: str, fits: Callable[[Any], bool]) -> None:
        if name not in config or not fits(config[name]):
            found = f"is {config[name]!r}" if name in config else "is missing"
            raise EyasError(f"{path}: {name} {found}, expected {wanted}; export the head again")

    for name, value in fixed.items():
        require(name, repr(value), lambda x, value=value: type(x) is type(value) and x == value)
    for name in sizes:
        require(name, "a positive integer", lambda x: type(x) is int and x > 0)
    for name in numbers:
        require(name, "a positive number", lambda x: type(x) in (int, float) and x > 0)
    for name in flags:
        require(name, "true or false", lambda x: type(x) is bool)
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
