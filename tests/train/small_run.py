"""Short runs on a small store, what they leave, and what is compared of two."""

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.train.served import read_tensors
from train.config import TrainConfig


def short_run(store: str, out: str, **changes: Any) -> TrainConfig:
    """Of a run of some steps that is measured and saved on its way."""
    settings = {"steps": 7, "batch_rows": 4, "ttt_steps": 2, "draft_vocab": 32, "learning_rate": 3e-2}
    settings |= {"optimizer": "adamw", "log_every": 2, "eval_every": 3, "save_every": 3, "init": "normal"}
    return TrainConfig(store, out, **settings | changes)


def config(store: str, out: str) -> TrainConfig:
    """Small enough for a step in milliseconds; eleven steps, so that no interval divides them."""
    return short_run(store, out, steps=11, batch_rows=2, ttt_steps=3, log_every=1, eval_every=4)


def ask_to_stop(patch: Any, owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Has SIGTERM come whenever `owner.name` is called, just before, with arguments of which `when` holds."""
    called = getattr(owner, name)

    def asked(*arguments: Any) -> Any:
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
        return called(*arguments)

    patch.setattr(owner, name, asked)


def lines_of(out):
    """The lines of metrics."""
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def timeless(out):
    """The lines of metrics, without the time they took."""
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines_of(out)]


def weights_of(out, name="last"):
    return read_tensors(f"{out}/{name}/model.safetensors")


def assert_same_head(out, other, name):
    """The same weights to the bit."""
    weights = weights_of(other, name)
    for tensor, weight in weights_of(out, name).items():
        np.testing.assert_array_equal(weight, weights[tensor], err_msg=f"{out} {name} {tensor}")


def assert_same_run(out, other):
    """The same heads, and the same metrics but for the time they took."""
    for name in ("best", "last"):
        assert_same_head(out, other, name)
    assert timeless(out) == timeless(other)
