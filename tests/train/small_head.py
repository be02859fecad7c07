"""A small target, a fresh head for it, and what an exported folder holds."""

import json

import jax
import numpy as np

from common.params import initialise
from tests.train.served import read_tensors
from train.export import export
from train.heads.eagle3.head import Eagle3

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TARGET = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 9,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": -1,
}
IDS = np.unique(np.random.default_rng(0).permutation(61)[:17])


def made(target=TARGET, aux_layers=(2, 4, 6), ids=IDS) -> tuple[dict, Eagle3]:
    head = Eagle3.for_target(target, len(ids), aux_layers)
    return initialise(head.parameters(), jax.random.key(0)), head


def exported(folder) -> str:
    """The fresh head as a bfloat16 folder at `folder`."""
    params, head = made()
    return export(str(folder), params, head, IDS, TARGET, metadata={"target": "Small-9", "AL": 1.5})


def config_of(folder):
    with open(f"{folder}/config.json") as file:
        return json.load(file)


def tensors_of(folder):
    return read_tensors(f"{folder}/model.safetensors")


def without(mapping: dict, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}
