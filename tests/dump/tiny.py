"""A random Llama of 8 layers as a Hugging Face folder, and a store of packed rows for it."""

import numpy as np
import pyarrow as pa

from common import checkpoint, files
from common.chat import tokenizer_hash
from common.store_writer import write_rows
from dump import target
from dump.target.weights import stacks

V, H, LAYERS, T = 64, 16, 8, 24


def write_model(folder: str, seed: int = 0, layers: int = LAYERS, tied: bool = False) -> str:
    """The folder; its tokenizer is a name only."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": V,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    files.write_json(f"{folder}/config.json", raw)
    files.write_json(f"{folder}/tokenizer.json", {"name": "tiny"})
    rng = np.random.default_rng(seed)
    declared = stacks(target.read_config(folder))
    shapes = {source: s.weight.shape for s in declared.values() for source in s.sources}
    tensors = {
        n: rng.normal(1 if "norm" in n else 0, 0.1, shape).astype(np.float32) for n, shape in shapes.items()
    }
    checkpoint.write(f"{folder}/model.safetensors", tensors)
    return folder


def write_store(url: str, model: str, rows: int = 11, alone: bool = False) -> str:
    """Rows of two documents and some padding each; `alone` gives every document a row of its own."""
    rng = np.random.default_rng(1)
    cut, end = T // 2 - 3, T - 2
    segments, positions = np.zeros((2, rows, T), np.int32)
    segments[:, :cut], segments[:, cut:end] = 1, 2
    positions[:, :cut], positions[:, cut:end] = np.arange(cut), np.arange(end - cut)
    tokens = np.where(segments > 0, rng.integers(0, V, (rows, T)), 0).astype(np.int32)
    columns = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    columns["loss_mask"] = ((segments > 0) & (positions > 3)).astype(np.uint8)
    counts = np.bincount(tokens[columns["loss_mask"] > 0], minlength=V).astype(np.int64)
    if alone:
        columns, rows = {name: _unpacked(column, cut, end) for name, column in columns.items()}, 2 * rows
    index = pa.table({"id": ["a"], "split": ["train"], "row": [0]})
    manifest = {"rows": rows, "length": T, "vocab_size": V, "tokenizer_hash": tokenizer_hash(model)}
    write_rows(url, columns, counts, index, manifest)
    return url


def _unpacked(column: np.ndarray, cut: int, end: int) -> np.ndarray:
    """[2R, T]: the first documents of all rows, then the second ones, each from position 0 on."""
    first, second = np.zeros_like(column), np.zeros_like(column)
    first[:, :cut], second[:, : end - cut] = column[:, :cut], column[:, cut:end]
    return np.concatenate((first, second))
