"""A GGUF file converts to the folder that it was made from."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from common.errors import EyasError
from pipelines.from_gguf import unpermute, write_folder

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 32, 2
BYTES = [chr(i) for i in range(33, 127)] + ["Ġ"]


def permuted(weight, heads):
    """llama.cpp's order, said row by row: old row h*d + i goes to 2i, and h*d + d/2 + i to 2i + 1."""
    d = weight.shape[0] // heads
    out = np.empty_like(weight)
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i] = weight[h * d + i]
            out[h * d + 2 * i + 1] = weight[h * d + d // 2 + i]
    return out


def tiny_gguf(path, pre="smollm"):
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "20", "th"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["2 0", "t h"])
    for add, token in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_unk_token_id, 0),
    ):
        add(token)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    expected = {}

    def add(gguf_name, hf_name, shape, heads=None):
        raw = quants.quantize(rng.standard_normal(shape, np.float32), GGMLQuantizationType.Q8_0)
        weight = quants.dequantize(raw, GGMLQuantizationType.Q8_0)
        expected[hf_name] = weight
        stored = weight if heads is None else permuted(weight, heads)
        raw = quants.quantize(stored, GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(quants.dequantize(raw, GGMLQuantizationType.Q8_0), stored)
        writer.add_tensor(gguf_name, raw, raw_dtype=GGMLQuantizationType.Q8_0)

    def norm(gguf_name, hf_name):
        expected[hf_name] = rng.standard_normal(HIDDEN, np.float32)
        writer.add_tensor(gguf_name, expected[hf_name])

    kv = HIDDEN // HEADS * KV_HEADS
    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    norm("output_norm.weight", "model.norm.weight")
    for i in range(LAYERS):
        old, new = f"blk.{i}.", f"model.layers.{i}."
        norm(old + "attn_norm.weight", new + "input_layernorm.weight")
        norm(old + "ffn_norm.weight", new + "post_attention_layernorm.weight")
        add(old + "attn_q.weight", new + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), HEADS)
        add(old + "attn_k.weight", new + "self_attn.k_proj.weight", (kv, HIDDEN), KV_HEADS)
        add(old + "attn_v.weight", new + "self_attn.v_proj.weight", (kv, HIDDEN))
        add(old + "attn_output.weight", new + "self_attn.o_proj.weight", (HIDDEN, HIDDEN))
        add(old + "ffn_gate.weight", new + "mlp.gate_proj.weight", (2 * HIDDEN, HIDDEN))
        add(old + "ffn_up.weight", new + "mlp.up_proj.weight", (2 * HIDDEN, HIDDEN))
        add(old + "ffn_down.weight", new + "mlp.down_proj.weight", (HIDDEN, 2 * HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    expected = tiny_gguf(folder / "tiny.gguf")
    write_folder(str(folder / "tiny.gguf"), str(folder), "a note")
    return folder, expected


def test_weights_are_the_dequantised_ones_in_hugging_face_order(converted):
    folder, expected = converted
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_config_takes_its_fields_from_the_metadata(converted):
    folder, _ = converted
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 10000.0
    assert config["head_dim"] == HIDDEN // HEADS
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["max_position_embeddings"] == 128
    assert config["tie_word_embeddings"] is True
    assert config["note"] == "a note"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_splits_digits_and_keeps_specials_whole(converted):
    folder, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>then 2024 that<|im_end|>"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert pieces[0] == "<|im_start|>"
    assert pieces[-1] == "<|im_end|>"
    assert "20" not in pieces  # the merge exists, the Digits step forbids it
    assert pieces.count("th") == 2
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_unpermute_undoes_the_row_by_row_order():
    weight = np.arange(24 * 3, dtype=np.float32).reshape(24, 3)
    np.testing.assert_array_equal(unpermute(permuted(weight, 3), 3), weight)


def test_another_pretokenizer_is_refused(tmp_path):
    tiny_gguf(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(EyasError, match="'llama-bpe', only 'smollm'"):
        write_folder(str(tmp_path / "other.gguf"), str(tmp_path), "")
