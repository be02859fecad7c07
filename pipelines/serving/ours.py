"""Our own figures of answers that a server gave: their features are dumped, the head is walked over them."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
        exact = {"dtype": "float32", "precision": "float32"}
        dump.run(dump.DumpConfig(model, store, **exact, aux_layers=aux_layers or None))
        config = evaluate.EvaluateConfig(head, store, ngrams=False, dtype="float32", **options)
        return evaluate.run(config)["head"]


@dataclass(frozen=True)
class _Asked:
    """A prompt of the protocol of speculate: one question, in tokens."""

    tokens: list[int]
    room: int
    category: str = ""

    def behind(self, answers: list[list[int]]) -> tuple[list[int], int] | None:
        return None if answers else (self.tokens, self.room)


def chained(
    model: str, head: str, stops: frozenset[int], prompts: list[list[int]], room: int, slots: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """(figures of our own chain of drafts, its answers without the stop token): what `speculate` measures."""
    from dump import target
    from pipelines.speculate.config import SpeculateConfig
    from pipelines.speculate.measure import Figures, answer
    from pipelines.speculate.run import engines
    from train import evaluate, launch

    cfg = target.read_config(model)
    length = max(map(len, prompts)) + room
    shape = {"steps": launch.TOKENS, "slots": slots, "length": length}
    config = SpeculateConfig(model, head, "none", **shape, dtype="float32", plain=False)
    drafting, _ = engines(config, cfg, evaluate.load_head(head, cfg.text))
    found, _ = answer(drafting, stops, [_Asked(prompt, room) for prompt in prompts], 0, lambda n: None)
    figures = Figures(launch.TOKENS)
    for (one,) in found:
        figures.count(one)
    return figures.summary(), [one.tokens for (one,) in found]


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
