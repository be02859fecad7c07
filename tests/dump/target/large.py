"""A large checkpoint, written or loaded in a process of its own: python -m tests.dump.target.large VERB …

write FOLDER GIB      several shards of random bytes, a Llama of about that size
load FOLDER DP TP     prints what loading it took, as JSON
"""

import json
import sys
import time

import ml_dtypes
import numpy as np

from common import safetensors, storage
from tests.memory import most_held

HIDDEN, FFN, VOCAB = 2048, 8192, 32_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-6,
}
LAYER = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (FFN, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
ENDS = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
LAYERS_A_SHARD = 8


def write(folder: str, gib: float) -> None:
    """Shards of 8 layers (1 GiB) each, and the index."""
    layer_bytes = 2 * sum(np.prod(shape) for shape in LAYER.values())
    layers = max(8, round(gib * 2**30 / layer_bytes))
    random = (
        np.random.default_rng(0).standard_normal(FFN * HIDDEN + 997, np.float32).astype(ml_dtypes.bfloat16)
    )
    placed: dict[str, str] = {}

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        name = f"model-{number:05}.safetensors"
        tensors = {
            f"{key}.weight": np.resize(random[i % 997 :], shape)
            for i, (key, shape) in enumerate(shapes.items())
        }
        safetensors.write(f"{folder}/{name}", tensors)
        placed.update(dict.fromkeys(tensors, name))

    shard(0, ENDS)
    for first in range(0, layers, LAYERS_A_SHARD):
        own = range(first, min(first + LAYERS_A_SHARD, layers))
        shard(
            1 + first // LAYERS_A_SHARD, {f"model.layers.{i}.{k}": s for i in own for k, s in LAYER.items()}
        )
    storage.write_json(f"{folder}/{safetensors.INDEX}", {"weight_map": placed})
    storage.write_json(f"{folder}/config.json", CONFIG | {"num_hidden_layers": layers})


def load(folder: str, dp: int, tp: int) -> dict[str, float]:
    """Bytes of the arrays (on every device) and of the files, bytes read, the process's peak, and seconds."""
    from pipelines import arenas

    arenas.share()  # as the command does
    import jax
    import jax.numpy as jnp

    from common.mesh import make_mesh
    from dump import target

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", dp * tp)
    found = {"read": 0}
    whole = safetensors.Checkpoint.read

    def count(self, name, index=()):
        value = whole(self, name, index)
        found["read"] += value.nbytes
        return value

    safetensors.Checkpoint.read = count
    mesh = make_mesh(dp, tp)
    start = time.monotonic()
    weights = target.load(folder, target.read_config(folder), mesh, jnp.bfloat16)
    jax.block_until_ready(weights)
    found["seconds"] = round(time.monotonic() - start, 1)
    found["held"] = sum(part.data.nbytes for w in weights.values() for part in w.addressable_shards)
    found["files"] = sum(t.nbytes for t in safetensors.Checkpoint.open(folder).tensors.values())
    found["peak"] = most_held()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], float(sys.argv[3]))
    else:
        print(json.dumps(load(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
