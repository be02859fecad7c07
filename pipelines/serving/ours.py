"""Our own figures of answers that a server gave: their features are dumped, the head is walked over them."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from common.store_writer import write_rows
from dump.tokenizer_files import tokenizer_hash

Asked = Sequence[tuple[list[int], list[int]]]  # prompts and their answers, in tokens
_MULTIPLE = 64  # of the length of rows: few shapes are compiled


def walked(
    model: str, vocab_size: int, head: str, aux_layers: tuple[int, ...], asked: Asked, **options: Any
) -> dict[str, Any]:
    """The metrics of `eval` over answers of the target in the folder `model`; `options` are eval's."""
    from dump import dump
    from train import evaluate

    with tempfile.TemporaryDirectory(prefix="eyas-answers-") as place:
        store = os.path.join(place, "store")
        _write(store, asked, vocab_size, tokenizer_hash(model))
        dump.run(dump.DumpConfig(model, store, dtype="float32", aux_layers=aux_layers))
        config = evaluate.EvaluateConfig(head, store, ngrams=False, dtype="float32", **options)
        return evaluate.run(config)["head"]


def _write(store: str, asked: Asked, vocab_size: int, tokenizer: str) -> None:
    """A row an answer, all of them held out."""
    longest = max(len(prompt) + len(answer) for prompt, answer in asked)
    R, T = len(asked), -(-longest // _MULTIPLE) * _MULTIPLE
    columns = {name: np.zeros((R, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    columns["loss_mask"] = np.zeros((R, T), np.uint8)
    lengths = []
    for row, (prompt, answer) in enumerate(asked):
        n = len(prompt) + len(answer)
        columns["tokens"][row, :n] = prompt + answer
        columns["segment_ids"][row, :n] = 1
        columns["positions"][row, :n] = np.arange(n)
        columns["loss_mask"][row, len(prompt) : n] = 1
        lengths.append(n)
    index = pa.table(
        {
            "id": [str(row) for row in range(R)],
            "split": ["test"] * R,
            "row": np.arange(R),
            "length": np.array(lengths),
        }
    )
    about = {"rows": R, "length": T, "vocab_size": vocab_size, "tokenizer_hash": tokenizer}
    write_rows(store, columns, np.zeros(vocab_size, np.int64), index, about)
