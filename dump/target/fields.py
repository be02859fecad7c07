"""config.json is read field by field; what nobody read and nobody knows to be harmless is refused."""

from typing import Any

from common.errors import EyasError
from common.rope import check_scaling
from dump.target.spec import Rope

_REQUIRED = object()

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


class Fields:
    """Reads config.json and remembers what was read; `finish` refuses the rest by name."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw = self.original = raw
        self.where = where
        self.dynamic_limit: int | None = None  # rows longer than this would change a dynamic rotation
        self._read: set[str] = set()

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, or `default` where it is absent or null; EyasError if it is required."""
        self._read.add(name)
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise EyasError(f"{self.where} lacks {name!r}; complete config.json")
        return default

    def nullable(self, name: str, default: Any) -> Any:
        """The field, null included; `default` only where it is absent."""
        self._read.add(name)
        return self.raw.get(name, default)

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """A field that must be a positive integer."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EyasError(f"{self.where}: {name}={value!r} must be a positive integer")
        return value

    def any_size(self, *names: str) -> int:
        """The first of several names of one field that is present."""
        present = [name for name in names if self.raw.get(name) is not None]
        self._read.update(names)
        return self.size(present[0] if present else names[0])

    def only(self, name: str, known: tuple[Any, ...], default: Any) -> Any:
        """A field of which only some values are implemented."""
        value = self.get(name, default)
        if value not in known:
            raise EyasError(f"{self.where}: {name}={value!r} is not supported; supported: {_list(known)}")
        return value

    def skip(self, *names: str) -> None:
        """Fields of the family that the forward pass does not depend on."""
        self._read.update(names)

    def defaults(self, **values: Any) -> None:
        """Values of fields that the family's published files leave out."""
        self.raw = values | {name: value for name, value in self.raw.items() if value is not None}

    def rope(self, head_dim: int, theta: float = 10000.0, partial: float = 1.0) -> Rope:
        """The rotation that `rope_parameters`, or `rope_theta` and `rope_scaling`, describe."""
        scaling = dict(self.get("rope_scaling", None) or {}) | dict(self.get("rope_parameters", None) or {})
        theta = scaling.get("rope_theta") or self.get("rope_theta", theta)
        partial = scaling.get("partial_rotary_factor") or self.get("partial_rotary_factor", partial)
        self._read.update({"rope_theta", "partial_rotary_factor"})
        return self.rotation(int(head_dim * partial), theta, scaling)

    def rotation(self, dim: int, theta: float, scaling: dict[str, Any]) -> Rope:
        """A checked Rope; EyasError with the file's name if the scaling is not supported."""
        if scaling.get("factor") is None and scaling.get("original_max_position_embeddings"):
            context = scaling["original_max_position_embeddings"]
            scaling = scaling | {"factor": self.size("max_position_embeddings") / context}
        try:
            kind = check_scaling(scaling)
        except EyasError as error:
            raise EyasError(f"{self.where}: {error}") from None
        if kind == "dynamic":
            self.dynamic_limit = self.size("max_position_embeddings")
        kept = {} if kind == "default" else scaling
        known = tuple(sorted((name, value) for name, value in kept.items() if value is not None))
        return Rope(dim, float(theta), known)

    def finish(self) -> None:
        """EyasError naming the first field that is set, was not read, and is not known to be harmless."""
        for name, value in self.raw.items():
            if name in self._read or name in HARMLESS or value in (None, False, [], {}):
                continue
            raise EyasError(
                f"{self.where} sets {name}={_short(value)}, which this family does not know here; "
                "remove it only if it leaves the model's result alone"
            )


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
