"""A golden is a config.json and what transformers computes with it; weights are made again from names."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from common import safetensors, storage
from tests.goldens.values import tensor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Golden:
    """`expected` maps aux [A, H], last [H] and logits [V] (with the tokens in front) to [60, ...]."""

    name: str
    config: dict
    shapes: dict[str, list]  # tensor of the checkpoint -> [shape, dtype]
    aux_layers: tuple[int, ...]
    tokens: np.ndarray
    expected: dict[str, np.ndarray]


def names() -> list[str]:
    """All goldens."""
    return sorted(path.stem for path in HERE.glob("*.json"))


def config(name: str) -> dict:
    """The config.json of a golden."""
    return storage.read_json(f"{HERE}/{name}.json")


def read(name: str) -> Golden:
    """A committed golden."""
    with safe_open(HERE / f"{name}.safetensors", "np") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    tokens = arrays.pop("tokens")
    return Golden(name, about["config"], about["shapes"], tuple(about["aux_layers"]), tokens, arrays)


def write_folder(golden: Golden, folder: str | Path) -> str:
    """Writes the golden's model as a Hugging Face folder; returns its path."""
    weights = {name: tensor(name, tuple(shape), dtype) for name, (shape, dtype) in golden.shapes.items()}
    storage.write_json(f"{folder}/config.json", golden.config)
    safetensors.write(f"{folder}/model.safetensors", weights)
    return str(folder)
