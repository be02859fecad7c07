"""What type every field of config.json has; a value of another type is refused before anything uses it."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from common.errors import EyasError

_LAYERS, _EXPERTS, _SIZE = 1_000, 10_000, 1 << 31  # above what any model has, below what could not be listed


@dataclass(frozen=True)
class Kind:
    """A type of field: what is expected, in words, and whether a value is that."""

    words: str
    fits: Callable[[Any], bool]
    null: bool = False  # null is a value of its own, or stands for a default that depends on other fields

    def or_null(self) -> "Kind":
        return Kind(f"{self.words} or null", self.fits, True)


Table = Mapping[str, Union[Kind, "Table"]]


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and least <= x <= most


def _number(above: float) -> Callable[[Any], bool]:
    return lambda x: type(x) in (int, float) and math.isfinite(x) and x > above


def _list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(fits, x))


def _text(value: Any) -> bool:
    return isinstance(value, str)


SIZE = Kind("a positive integer", _whole(1, _SIZE))
COUNT = Kind("an integer of 0 or more", _whole(0, _SIZE))
LAYERS = Kind(f"an integer of 1 to {_LAYERS:,}", _whole(1, _LAYERS))
EXPERTS = Kind(f"an integer of 1 to {_EXPERTS:,}", _whole(1, _EXPERTS))
POSITIVE = Kind("a positive number", _number(0))
THETA = Kind("a number above 1", _number(1))
NUMBER = Kind("a number", _number(-math.inf))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", _text)
TEXTS = Kind("a list of strings", _list(_text))
COUNTS = Kind("a list of integers of 0 or more", _list(_whole(0, _SIZE)))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
TOKEN = Kind(
    "a token id, a list of them or null", lambda x: type(x) is int or _list(_whole(-1, _SIZE))(x), True
)


def table(**names: str) -> dict[str, Kind]:
    """{field: kind} from KIND="its fields"; KIND_or_null where null is allowed."""
    found: dict[str, Kind] = {}
    for kind, fields in names.items():
        known: Kind = globals()[kind.removesuffix("_or_null")]
        found |= dict.fromkeys(fields.split(), known.or_null() if kind.endswith("_or_null") else known)
    return found


_ROTATION = table(
    TEXT_or_null="rope_type type",
    THETA_or_null="rope_theta",
    POSITIVE_or_null="""factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow
        partial_rotary_factor""",
    NUMBER_or_null="mscale mscale_all_dim",
    SIZE_or_null="original_max_position_embeddings",
    FLAG_or_null="truncate",
)
ROPE: Table = _ROTATION | {"full_attention": _ROTATION, "sliding_attention": _ROTATION}

CONFIG: Table = table(
    SIZE="""hidden_size intermediate_size moe_intermediate_size num_attention_heads vocab_size
        max_position_embeddings num_experts_per_tok kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
        index_topk decoder_sparse_step full_attention_interval sliding_window_pattern _sliding_window_pattern
        linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
        linear_conv_kernel_dim n_shared_experts""",
    SIZE_or_null="head_dim num_key_value_heads q_lora_rank sliding_window n_group topk_group rotary_dim",
    LAYERS="num_hidden_layers",
    EXPERTS="num_experts num_local_experts n_routed_experts",
    COUNT="""first_k_dense_replace max_window_layers shared_intermediate_size moe_layer_freq
        shared_expert_intermediate_size""",
    POSITIVE="""rms_norm_eps routed_scaling_factor swiglu_alpha swiglu_limit query_pre_attn_scalar
        layernorm_full_attention_beta layernorm_linear_attention_beta layernorm_mlp_beta""",
    POSITIVE_or_null="partial_rotary_factor final_logit_softcapping attn_logit_softcapping",
    THETA="rope_theta rope_local_base_freq",
    FLAG="""attention_bias mlp_bias tie_word_embeddings use_sliding_window norm_topk_prob use_qk_norm
        rope_interleave rope_interleaved use_routing_bias""",
    FLAG_or_null="use_bidirectional_attention",
    TEXT="hidden_act hidden_activation",
    TEXT_or_null="scoring_func topk_method qk_norm_type model_type",
    TEXTS="architectures",
    TEXTS_or_null="layer_types mlp_layer_types",
    COUNTS_or_null="mlp_only_layers attn_type_list",
    TOKEN="bos_token_id eos_token_id pad_token_id",
    OBJECT="text_config",
    OBJECT_or_null="quantization_config auto_map",
) | {"rope_scaling": ROPE, "rope_parameters": ROPE}

OBJECT_FILE: Table = table(OBJECT_or_null="quantization")  # of hf_quant_config.json

# Fields that do not change what the forward pass computes: bookkeeping, training, generation, other runtimes.
_HARMLESS = """
    note cache_implementation
    _name_or_path _attn_implementation architectures model_type torch_dtype dtype transformers_version
    use_cache bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop embd_pdrop
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    max_position_embeddings pretraining_tp gradient_checkpointing chunk_size_feed_forward
    id2label label2id problem_type finetuning_task task_specific_params tokenizer_class prefix
    is_decoder is_encoder_decoder tie_encoder_decoder add_cross_attention cross_attention_hidden_size
    pruned_heads torchscript use_bfloat16 tf_legacy_loss use_return_dict unsloth_version unsloth_fixed
    is_llama_config transformers.js_config base_model_tp_plan base_model_pp_plan
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences num_beams num_beam_groups
    diversity_penalty early_stopping max_length min_length do_sample remove_invalid_values
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id
    forced_eos_token_id"""
HARMLESS = frozenset(_HARMLESS.split())


def check_types(found: Any, where: str, types: Table, place: str = "") -> None:
    """EyasError naming the first field of an object whose value is not of its type."""
    if not isinstance(found, dict):
        raise EyasError(f"{where} is {short(found)}, expected a JSON object; fetch it again")
    for name, value in found.items():
        kind = types.get(name)
        if kind is None:
            continue
        if isinstance(kind, Mapping):
            if value is not None and not isinstance(value, dict):
                raise EyasError(f"{where}: {place}{name} is {short(value)}, expected an object or null")
            check_types(value or {}, where, kind, f"{place}{name}.")
        elif not (kind.null if value is None else kind.fits(value)):
            raise EyasError(f"{where}: {place}{name} is {short(value)}, expected {kind.words}")


def short(value: Any) -> str:
    """A value on a line of its own."""
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
