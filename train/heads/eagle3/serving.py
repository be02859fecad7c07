"""The folder of an EAGLE3 head in each layout: its config.json, written and read, and its tensors.

Read off the servers' own loaders: vLLM and SGLang `models/llama_eagle3.py`, sglang-jax
`models/llama_eagle3.py`, tpu-inference `models/jax/llama_eagle3.py`, SafeAILab/EAGLE `eagle/model/cnets.py`.
The layout of speculators has a config.json of its own (see speculators.py).
"""

from typing import Any, TypeVar

from common.aux_layers import default_aux_layers, is_default
from common.errors import EyasError
from common.params import Declaration, Param
from train.heads.eagle3 import speculators
from train.heads.eagle3.aux_keys import aux_keys, read_aux_layers
from train.heads.eagle3.sizes import Sizes, layer_name, parameters
from train.servers import PORTABLE, SPECULATORS, TPU
from train.serving_config import canonical_rope, check_fields, token_ids

Kind = TypeVar("Kind", bound=Sizes)
LAYOUTS = (PORTABLE, SPECULATORS, TPU)
VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "`--fc-norm`": {"fc_norm": True},
    "`--norm-output`": {"norm_output": True},
    "`--norm-before-residual`": {"norm_before_residual": True},
    "`--layers 2`": {"layers": 2},
    "`--num-kv-heads` of twice the target's": {"num_kv_heads": 16},
    "`--lm-head frozen` or `tied`": {"lm_head": "frozen"},
    "`--aux-layers` of three others": {"aux_layers": (4, 15, 27)},
    "`--aux-layers` of five": {"aux_layers": (2, 8, 15, 22, 29)},
}
# vLLM, by which tpu-inference reads config.json, prefixes the second with Eagle3, whose JAX model there is;
# for the first there is none. SGLang knows the first alone.
_ARCHITECTURES = {PORTABLE: ["LlamaForCausalLMEagle3"], TPU: ["LlamaForCausalLM"]}
_FIXED = {
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


def layout_of(config: dict[str, Any]) -> str | None:
    """The layout of a folder with that config.json; None if no EAGLE3 head was exported to it."""
    known = _ARCHITECTURES | {SPECULATORS: speculators.ARCHITECTURES}
    return next((name for name, its in known.items() if config.get("architectures") == its), None)


def write(head: Sizes, target: dict[str, Any], dtype: str, layout: str, verifier: str) -> dict[str, Any]:
    """The config.json of a head. `target` is its target's; `dtype` names the weights' type; `verifier` is the
    target's folder or Hub id, which the layout of speculators names.

    RoPE is written as `rope_theta` and `rope_scaling`, which transformers 5 turns into `rope_parameters` by
    itself. `target_hidden_size` is left out: it defaults to `hidden_size` everywhere, and EAGLE's own code
    skips the target's embedding where it finds the key.
    """
    config = {
        **_FIXED,
        **{name: getattr(head, field) for name, field in (_SIZES | _NUMBERS | _FLAGS).items()},
        "rope_scaling": canonical_rope(head.rope),
        "torch_dtype": dtype,
        **token_ids(target, head.vocab_size),
        **aux_keys(head.aux_layers, head.num_target_layers),
    }
    if layout == SPECULATORS:
        return speculators.write(config, list(head.aux_layers), target, verifier)
    return {"architectures": _ARCHITECTURES[layout]} | config


def read(kind: type[Kind], path: str, config: dict[str, Any], num_target_layers: int) -> Kind:
    """The head that the config.json at `path` describes, for a target of `num_target_layers` layers.

    EyasError for a field that a server needs and that is missing, of another type or of another value.
    """
    if layout_of(config) == SPECULATORS:
        config = speculators.read(path, config)
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


def tensors(head: Sizes, layout: str) -> dict[str, str]:
    """{name in model.safetensors: parameter}. vLLM norms what enters a later layer by its `input_layernorm`,
    SGLang by its `hidden_norm`: each finds it under its own name, and never looks at the other."""
    names = {name: name for name in parameters(head)}
    if layout == SPECULATORS:
        return {name.replace("midlayer.", "layers.0."): name for name in names}
    later = [layer_name(number) for number in range(1, head.layers)]
    return names | {f"{name}.hidden_norm.weight": f"{name}.input_layernorm.weight" for name in later}


def beside(head: Sizes, layout: str) -> Declaration:
    """What model.safetensors has beside parameters: the maps of the draft vocabulary, and the target's
    embedding where a loader wants its own. vLLM refuses maps of a whole vocabulary, the JAX model of
    tpu-inference refuses to be without."""
    N, V = head.draft_vocab_size, head.vocab_size
    maps = {"d2t": Param((N,), (None,)), "t2d": Param((V,), (None,))}
    embedding = {speculators.EMBEDDING: Param((V, head.target_hidden_size), (None, None))}
    return (maps if N < V or layout == TPU else {}) | (embedding if layout == SPECULATORS else {})


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
