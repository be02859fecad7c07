"""A run of eleven steps on a small store, and what is compared of two."""

import json

import numpy as np

from tests.train.served import read_tensors
from train.config import TrainConfig


def config(store, out):
    """Small enough for a step in milliseconds; eleven steps, so that no interval divides them."""
    return TrainConfig(
        store=store,
        out=out,
        steps=11,
        batch_rows=2,
        ttt_steps=3,
        draft_vocab=32,
        optimizer="adamw",
        learning_rate=3e-2,
        log_every=1,
        eval_every=4,
        save_every=3,
        init="normal",
    )


def lines_of(out):
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def weights_of(out):
    return read_tensors(f"{out}/last/model.safetensors")


def assert_same_run(out, other):
    """Same weights and same metrics, but for the time they took."""
    for name, weight in weights_of(other).items():
        np.testing.assert_array_equal(weights_of(out)[name], weight, err_msg=name)
    timeless = [
        [{n: x for n, x in line.items() if n != "seconds"} for line in lines_of(o)] for o in (out, other)
    ]
    assert timeless[0] == timeless[1]
