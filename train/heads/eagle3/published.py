"""EAGLE3 heads as others publish them: the layout of SGLang and EAGLE, and that of speculators.

Sources: SafeAILab/EAGLE `eagle/model/{configs,cnets}.py`, SpecForge `modeling/draft/llama3_eagle.py`,
vllm-project/speculators `models/eagle3/{config,core}.py`, vLLM `transformers_utils/configs/speculators`.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from common import schema
from common.aux_layers import default_aux_layers
from common.errors import EyasError
from common.schema import NotRequired, TypedDict
from train.heads.eagle3.aux_keys import AUX_KEY
from train.heads.eagle3.sizes import METHOD, Sizes, parameters, rope_of

_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_SPECULATORS = "speculators_model_type"
_ABSENT = (  # what our head does not have, and what stands for that: a config.json may say so or be silent
    ("attention_bias", False),
    ("mlp_bias", False),
    ("bias", False),
    ("qkv_bias", False),
    ("qk_norm", False),
    ("norm_before_fc", False),
    ("use_aux_norm", False),
    ("hidden_act", "silu"),
    ("use_aux_hidden_state", True),
    ("logit_scale", 1.0),
    ("sliding_window", None),
)
# Tensors beside the head's own: copies of the target's, tables that follow from config.json, vocabulary maps.
_BESIDE = re.compile(
    r"(model\.)?(embed_tokens\.weight|d2t|t2d)|verifier_(norm|lm_head)\.weight|.*rotary_emb\.inv_freq"
)


class _Fields(TypedDict):
    """Fields that are not counts or flags, which are checked where they are read."""

    transformer_layer_config: NotRequired[dict[str, Any] | None]
    eagle_config: NotRequired[dict[str, Any] | None]
    eagle_aux_hidden_state_layer_ids: NotRequired[list[int] | None]
    model_type: NotRequired[str]
    rms_norm_eps: NotRequired[Annotated[float, Field(gt=0)]]
    rope_theta: NotRequired[Annotated[float, Field(gt=0)] | None]
    rope_parameters: NotRequired[dict[str, Any] | None]
    rope_scaling: NotRequired[dict[str, Any] | None]
    full_attention: NotRequired[dict[str, Any] | None]


def is_published(config: dict[str, Any]) -> bool:
    """Whether a config.json is of an EAGLE3 head, in one of the two layouts."""
    if _SPECULATORS in config:
        return config[_SPECULATORS] == METHOD
    named = config.get("architectures")
    return isinstance(named, list) and len(named) == 1 and named[0] in _ARCHITECTURES


def read(path: str, config: dict[str, Any], num_target_layers: int) -> dict[str, Any]:
    """The fields of `Sizes` of the head whose config.json is at `path`. EyasError for what is missing, and,
    by its name, for what our head does not have."""
    _require_types(path, config)
    layer = config
    if _SPECULATORS in config:
        layer = config.get("transformer_layer_config")
        if not layer:
            raise EyasError(f"{path}: transformer_layer_config is missing; fetch the head again")
    if layer.get("model_type", "llama") != "llama":
        raise EyasError(
            f"{path}: its layers are those of {layer['model_type']}, expected llama's; give another head"
        )
    nested = config.get("eagle_config") or {}
    for source in (layer, config, nested):
        for name, absent in _ABSENT:
            if source.get(name, absent) != absent:
                raise EyasError(
                    f"{path}: {name} is {source[name]!r}, which cannot be trained on here; give another head"
                )
    hidden, heads = _count(path, layer, "hidden_size"), _count(path, layer, "num_attention_heads")
    vocab = _count(path, layer, "vocab_size")
    rope, theta = rope_of(layer)
    return dict(
        hidden_size=hidden,
        target_hidden_size=config.get("target_hidden_size") or hidden,
        num_heads=heads,
        num_kv_heads=_count(path, layer, "num_key_value_heads", heads),
        head_dim=_count(path, layer, "head_dim", hidden // heads),
        ffn=_count(path, layer, "intermediate_size"),
        draft_vocab_size=_count(path, config, "draft_vocab_size", vocab),
        vocab_size=vocab,
        rms_eps=float(layer.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope=rope,
        max_position=_count(path, layer, "max_position_embeddings", 2048),
        aux_layers=_aux_layers(config, nested, num_target_layers),
        num_target_layers=num_target_layers,
        layers=_count(path, layer, "num_hidden_layers", 1),
        fc_norm=_flag(path, config, "fc_norm", False),
        norm_output=_flag(path, config, "norm_output", False),
        # Of the speculators layout vLLM takes a missing one for true, speculators itself for false.
        norm_before_residual=_flag(
            path, config, "norm_before_residual", None if _SPECULATORS in config else False
        ),
    )


def _require_types(path: str, config: dict[str, Any]) -> None:
    """EyasError for a field that is not what `_Fields` says, wherever in config.json it is."""
    schema.check(_Fields, config, path, "fetch the head again")
    for value in config.values():
        if isinstance(value, dict):
            _require_types(path, value)


def _count(path: str, config: dict[str, Any], name: str, otherwise: int | None = None) -> int:
    found = config.get(name)
    found = otherwise if found is None else found
    if type(found) is not int or found < 1:
        raise EyasError(
            f"{path}: {name} is {config.get(name)!r}, expected a positive integer; fetch it again"
        )
    return found


def _flag(path: str, config: dict[str, Any], name: str, otherwise: bool | None) -> bool:
    found = config.get(name, otherwise)
    if type(found) is not bool:
        raise EyasError(
            f"{path}: {name} is {config.get(name, 'missing')!r}, expected true or false; add what it was "
            "trained with"
        )
    return found


def _aux_layers(config: dict[str, Any], nested: dict[str, Any], num_target_layers: int) -> tuple[int, ...]:
    """In h_k terms. The nested list counts from the layer that made a state."""
    ids, before = config.get(AUX_KEY), nested.get(AUX_KEY)
    found = ids or (before and [k + 1 for k in before])
    return tuple(found) if found else default_aux_layers(num_target_layers)


def asked(c: Sizes, options: dict[str, Any], where: str) -> str:
    """How the output is trained. EyasError for an option that is not the head's."""
    for name, value in options.items():
        if (name, value) != ("lm_head", "frozen") and value != getattr(c, name):
            raise EyasError(
                f"{name}={value}, but {where} has {getattr(c, name)}; leave it out, or begin with a new head"
            )
    return options.get("lm_head", c.lm_head)


def sources(c: Sizes, found: Iterable[str], path: str) -> dict[str, str]:
    """{parameter: its name among the tensors `found`}. EyasError for the first missing or unknown one."""
    left = {name for name in found if not _BESIDE.fullmatch(name)}
    chosen = {}
    for name in parameters(c):
        chosen[name] = next((known for known in _names(name) if known in left), None)
        if chosen[name] is None:
            raise EyasError(f"{path} lacks {name}; it is not the head that its config.json describes")
        left -= set(_names(name))
    if left:
        raise EyasError(
            f"{path} has an unexpected {min(left)}; it is not the head that its config.json describes"
        )
    return chosen


def _names(name: str) -> list[str]:
    """The names under which a parameter is published."""
    names = [name, name.replace("midlayer.", "layers.0.")]
    if name.startswith("layers."):  # SGLang norms what enters a later layer by its hidden_norm
        names.append(name.replace("input_layernorm", "hidden_norm"))
    return names + [f"model.{known}" for known in names]
