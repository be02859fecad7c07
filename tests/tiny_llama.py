"""The smallest Llama that every stage takes: its config.json, and weights for a folder that has one."""

import numpy as np

from common import safetensors
from dump import target
from dump.target.weights import stacks

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def write_weights(folder: str, seed: int = 0) -> None:
    """Writes the model.safetensors that the folder's config.json describes."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for stack in stacks(target.read_config(folder)).values():
        shapes |= dict.fromkeys(stack.sources(), stack.weight.shape)
    tensors = {n: rng.normal("norm" in n, 0.1, shape).astype(np.float32) for n, shape in shapes.items()}
    safetensors.write(f"{folder}/model.safetensors", tensors)
