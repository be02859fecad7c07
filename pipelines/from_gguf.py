"""A GGUF file of a Llama with a byte-level BPE tokenizer becomes an ordinary Hugging Face folder.

Dequantised weights are written as float32: a quantised value is scale * integer + offset with float16
scale and offset, which float32 holds to its last bit or rounds once, as llama.cpp does; bfloat16 would
round a second time. Two things differ between the formats and are put right here: llama.cpp interleaves
the two rotary halves of each q and k head, and GGUF names the pre-tokenizer but does not contain it.
"""

import json
import os
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common import safetensors
from common.errors import EyasError
from common.progress import Progress

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def write_folder(gguf: str, folder: str, note: str) -> None:
    """Writes config, weights and tokenizer of the GGUF file at `gguf` into the existing `folder`.

    `note` goes into config.json and the weights' metadata. EyasError if the architecture or the
    pre-tokenizer is another than llama and smollm.
    """
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(key) != wanted:
            raise EyasError(f"{gguf}: {key} is {fields.get(key)!r}, only {wanted!r} can be converted")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _config(fields, tied) | {"note": note}
    _write(folder, "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(folder, "generation_config.json", generation)
    build_tokenizer(fields).save(os.path.join(folder, "tokenizer.json"))
    _write(folder, "tokenizer_config.json", _tokenizer_config(fields))
    path = os.path.join(folder, safetensors.SINGLE)
    safetensors.write(path, _weights(reader, config), {"note": note})


def _write(folder: str, name: str, value: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF holds float32; its shortest decimal is the number that was meant (1e-05).
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(str(np.float32(fields["llama.rope.freq_base"]))),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "torch_dtype": "float32",  # the name that readers before transformers 5 know
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # The class that loads tokenizer.json as it is; GPT2Tokenizer rebuilds it and loses the Digits step.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def build_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The `tokenizers` object of a GGUF's vocabulary, merges and token types (smollm pre-tokenizer).

    Digits are split one by one before the byte-level step; without it, numbers get other ids.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(text, special=kind == _CONTROL, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    with Progress("dequantise", len(reader.tensors), "tensor") as bar:
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            part = tensor.name.split(".")[-2]
            if part in heads:
                values = unpermute(values, heads[part])
            weights[hf_name(tensor.name)] = np.ascontiguousarray(values, np.float32)
            bar.update(1)
    return weights


def unpermute(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows in Hugging Face's order: within a head, GGUF's pairs (0, d/2, 1, d/2+1, ...) to halves.

    Inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor: 'blk.3.attn_q.weight' is layer 3's q_proj."""
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in outer:
        return outer[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
