"""The config.json of an EAGLE3 head, written and read, and which servers load which head.

Read off the servers' own loaders: vLLM 0.32 and SGLang `models/llama_eagle3.py`, sglang-jax
`models/llama_eagle3.py`, tpu-inference `models/jax/llama_eagle3.py`, SafeAILab/EAGLE `eagle/model/cnets.py`.
"""

from typing import Any, TypeVar

from common.aux_layers import default_aux_layers, is_default
from common.errors import EyasError
from train.heads.eagle3.sizes import Sizes, layer_name, parameters
from train.serving_config import (
    Limit,
    aux_keys,
    canonical_rope,
    check_fields,
    read_aux_layers,
    token_ids,
)

Kind = TypeVar("Kind", bound=Sizes)
ARCHITECTURE = "LlamaForCausalLMEagle3"
_FIXED = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_FLAGS = {
    "norm_before_residual": "norm_before_residual",  # its default differs between the layouts that vLLM reads
    "fc_norm": "fc_norm",
    "norm_output": "norm_output",
}
_SIZES = {  # the key in config.json: the field of Sizes
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "draft_vocab_size": "draft_vocab_size",
    "max_position_embeddings": "max_position",
}
_NUMBERS = {"rms_norm_eps": "rms_eps", "rope_theta": "rope_theta"}


def write(head: Sizes, target: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of a head. `target` is its target's; `dtype` names the weights' type.

    RoPE is written as `rope_theta` and `rope_scaling`, which transformers 5 turns into `rope_parameters` by
    itself. `target_hidden_size` is left out: it defaults to `hidden_size` everywhere, and EAGLE's own code
    skips the target's embedding where it finds the key.
    """
    return {
        **_FIXED,
        **{name: getattr(head, field) for name, field in (_SIZES | _NUMBERS | _FLAGS).items()},
        "rope_scaling": canonical_rope(head.rope),
        "torch_dtype": dtype,
        **token_ids(target, head.vocab_size),
        **aux_keys(head.aux_layers, head.num_target_layers),
    }


def read(kind: type[Kind], path: str, config: dict[str, Any], num_target_layers: int) -> Kind:
    """The head that the config.json at `path` describes, for a target of `num_target_layers` layers.

    EyasError for a field that a server needs and that is missing, of another type or of another value.
    """
    check_fields(path, config, _FIXED, _SIZES, _NUMBERS, _FLAGS)
    aux_layers = read_aux_layers(path, config) or default_aux_layers(num_target_layers)
    try:
        return kind(
            **{field: config[name] for name, field in (_SIZES | _NUMBERS | _FLAGS).items()},
            target_hidden_size=config["hidden_size"],
            rope=config["rope_scaling"],
            aux_layers=aux_layers,
            num_target_layers=num_target_layers,
        )
    except ValueError as error:
        raise EyasError(f"{path}: {error}; export the head again") from error


def facts(head: Sizes) -> list[str]:
    """RoPE and aux layers, in words."""
    scaling = canonical_rope(head.rope) or {"rope_type": "no"}
    default = is_default(head.aux_layers, head.num_target_layers)
    return [
        f"RoPE: theta {head.rope_theta:g}, {scaling['rope_type']} scaling",
        f"aux layers: {'the default of servers' if default else list(head.aux_layers)}",
    ]


def limits(head: Sizes) -> list[Limit]:
    """What of this head a server would refuse, or read as something else."""
    heads, scaling = head.num_heads, canonical_rope(head.rope) or {}
    custom = not is_default(head.aux_layers, head.num_target_layers)
    uneven, wide = head.hidden_size % heads > 0, head.head_dim * heads != head.hidden_size
    plain = ("sglang-jax", "tpu-inference", "eagle")  # which know the head of the paper alone
    known = [
        (custom, f"aux layers {list(head.aux_layers)}", plain),
        (head.fc_norm, "fc_norm, which they do not read", plain),
        (head.norm_output, "norm_output, which they do not read", plain),
        (head.norm_before_residual, "norm_before_residual, which they do not read", ("sglang", *plain)),
        (head.layers > 1, f"{head.layers} layers, only one", plain),
        (
            uneven,
            f"{heads} heads at hidden_size {head.hidden_size}: transformers 5 refuses a Llama whose heads do "
            "not divide it",
            ("vllm", "sglang"),
        ),
        (
            wide,
            f"heads of {head.head_dim}: it divides hidden_size {head.hidden_size} by {heads} heads",
            ("eagle",),
        ),
        (bool(scaling), f"{scaling.get('rope_type')} RoPE scaling in this form", ("eagle",)),
    ]
    return [Limit(what, servers) for holds, what, servers in known if holds]


def tensors(head: Sizes) -> dict[str, str]:
    """{name in model.safetensors: parameter}. vLLM norms what enters a later layer by its `input_layernorm`,
    SGLang by its `hidden_norm`: each finds it under its own name, and never looks at the other."""
    later = [layer_name(number) for number in range(1, head.layers)]
    both = {f"{name}.hidden_norm.weight": f"{name}.input_layernorm.weight" for name in later}
    return {name: name for name in parameters(head)} | both


def require_fit(head: Sizes, wanted: Sizes, where: str) -> None:
    """EyasError naming the first size or RoPE setting of `where` that is not `wanted`, its target's."""
    for field in ("hidden_size", "vocab_size", "rope_theta", "rope"):
        ours, its = getattr(head, field), getattr(wanted, field)
        if field == "rope":
            ours, its = canonical_rope(ours), canonical_rope(its)
        if ours != its:
            raise EyasError(
                f"{where} has {field} {ours}, its target {its}; give the target it was trained for"
            )
    outside = [k for k in head.aux_layers if not 0 <= k < wanted.num_target_layers]
    # Servers collect the states while the target runs, whatever the order in config.json.
    if outside or list(head.aux_layers) != sorted(set(head.aux_layers)):
        raise EyasError(
            f"{where} takes aux layers {list(head.aux_layers)} from a target of {wanted.num_target_layers} "
            "layers; expected layers of that target in ascending order, as servers give them"
        )
