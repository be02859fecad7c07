"""What type every field of config.json has, and which fields leave the forward pass alone."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

Size = Annotated[int, Field(ge=1, le=1 << 31)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Pair = Annotated[list[Size], Field(min_length=2, max_length=2)]
Layers = Annotated[int, Field(ge=1, le=1_000)]  # above what any model has, below what could not be listed
Experts = Annotated[int, Field(ge=1, le=10_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Theta = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=-(1 << 31), le=1 << 31)]  # -1 stands for none in some published files


class Rotation(TypedDict, total=False):
    """One rotation's part of `rope_parameters` or `rope_scaling`."""

    rope_type: str | None
    type: str | None
    rope_theta: Theta | None
    factor: Positive | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    attention_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    partial_rotary_factor: Positive | None
    mscale: Number | None
    mscale_all_dim: Number | None
    original_max_position_embeddings: Size | None
    truncate: bool | None


class Rotations(Rotation, total=False):
    """Of all layers, or of each kind of layer."""

    full_attention: Rotation | None
    sliding_attention: Rotation | None


class ConfigJson(TypedDict, total=False):
    """config.json: null stands for a value of its own, or for a default that depends on other fields."""

    architectures: Annotated[list[str], Field(min_length=1)]
    model_type: str | None
    auto_map: dict[str, Any] | None
    text_config: dict[str, Any]
    quantization_config: dict[str, Any] | None
    bos_token_id: Token | None
    eos_token_id: Token | list[Token] | None
    pad_token_id: Token | None

    hidden_size: Size
    vocab_size: Size
    num_hidden_layers: Layers
    max_position_embeddings: Size
    intermediate_size: Size
    rms_norm_eps: Positive
    hidden_act: str
    hidden_activation: str
    tie_word_embeddings: bool
    mlp_bias: bool

    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    attention_bias: bool
    use_qk_norm: bool
    qk_norm_type: str | None
    query_pre_attn_scalar: Positive
    final_logit_softcapping: Positive | None
    attn_logit_softcapping: Positive | None
    use_bidirectional_attention: bool | None
    layer_types: list[str] | None
    attn_type_list: list[Count] | None
    use_sliding_window: bool
    sliding_window: Size | None
    max_window_layers: Count
    sliding_window_pattern: Size
    _sliding_window_pattern: Size
    layernorm_full_attention_beta: Positive
    layernorm_linear_attention_beta: Positive
    layernorm_mlp_beta: Positive

    rope_theta: Theta
    rope_local_base_freq: Theta
    rope_scaling: Rotations | None
    rope_parameters: Rotations | None
    partial_rotary_factor: Positive | None
    rotary_dim: Size | None
    rope_interleave: bool
    rope_interleaved: bool

    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    index_topk: Size

    full_attention_interval: Size
    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size

    num_experts: Experts
    num_local_experts: Experts
    n_routed_experts: Experts
    num_experts_per_tok: Size
    n_shared_experts: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Count
    shared_intermediate_size: Count
    mlp_layer_types: list[str] | None
    mlp_only_layers: list[Count] | None
    first_k_dense_replace: Count
    decoder_sparse_step: Size
    moe_layer_freq: Count
    n_group: Size | None
    topk_group: Size | None
    topk_method: str | None
    scoring_func: str | None
    norm_topk_prob: bool
    routed_scaling_factor: Positive
    use_routing_bias: bool
    swiglu_alpha: Positive
    swiglu_limit: Positive


class Quantisation(TypedDict, total=False):
    """`quantization_config`, and the same in hf_quant_config.json."""

    quant_method: str | None
    fmt: str
    activation_scheme: str | None
    scale_fmt: str | None
    quant_algo: str | None
    format: str | None
    weight_block_size: Pair | None
    config_groups: dict[str, dict[str, Any]] | None
    sparsity_config: dict[str, Any] | None
    transform_config: dict[str, Any] | None
    expert_dtype: str | None
    modules_to_not_convert: list[str] | None
    ignored_layers: list[str] | None
    ignore: list[str] | None
    exclude_modules: list[str] | None


class QuantisedGroup(TypedDict, total=False):
    """One of `config_groups`."""

    targets: list[str]
    weights: dict[str, Any]
    input_activations: dict[str, Any] | None
    output_activations: dict[str, Any] | None
    format: str | None


class QuantisedWeights(TypedDict, total=False):
    """`weights` of a group."""

    num_bits: Size
    type: str
    symmetric: bool
    dynamic: bool | Literal["local"]
    strategy: str | None
    group_size: int | None
    block_structure: Pair | None


class QuantisationFile(TypedDict, total=False):
    """hf_quant_config.json."""

    quantization: dict[str, Any] | None


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


def short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
