"""A tiny random Llama as a Hugging Face folder, and a store of packed rows for it."""

import os

import numpy as np
import pyarrow as pa

from common import storage
from common.store_writer import write_rows
from dump.tokenizer_files import tokenizer_hash
from tests import tiny_llama

V, H, T = tiny_llama.CONFIG["vocab_size"], tiny_llama.CONFIG["hidden_size"], 24
ROWS = 11


def write_model(folder: str, seed: int = 0, layers: int = 8, tied: bool = False) -> str:
    """The folder; its tokenizer is a name only."""
    raw = tiny_llama.CONFIG | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    storage.write_json(f"{folder}/config.json", raw)
    storage.write_json(f"{folder}/tokenizer.json", {"name": "tiny"})
    storage.write_json(f"{folder}/tokenizer_config.json", {"chat_template": "none"})
    tiny_llama.write_weights(folder, seed)
    return folder


def write_store(url: str, model: str, rows: int = ROWS, alone: bool = False) -> str:
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
    index = pa.table({"id": ["a"], "split": ["train"], "row": [0], "length": [cut]})
    manifest = {"rows": rows, "length": T, "vocab_size": V, "tokenizer_hash": tokenizer_hash(model)}
    write_rows(url, columns, counts, index, manifest)
    return url


def _unpacked(column: np.ndarray, cut: int, end: int) -> np.ndarray:
    """[2R, T]: the first documents of all rows, then the second ones, each from position 0 on."""
    first, second = np.zeros_like(column), np.zeros_like(column)
    first[:, :cut], second[:, : end - cut] = column[:, :cut], column[:, cut:end]
    return np.concatenate((first, second))


def contents(folder: str) -> dict[str, bytes]:
    """Every file by its path, hidden ones too."""
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): storage.read_bytes(path) for path in paths}
