"""python by_sglang_jax.py FOLDER OUT.npz: the weights and token ids that sglang-jax's own loader reads.

Its attention is a TPU kernel, so nothing is computed here.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sgl_jax.srt.configs.model_config import ModelConfig
from sgl_jax.srt.models.registry import ModelRegistry
from sgl_jax.srt.utils.mesh_utils import create_device_mesh

folder, out = sys.argv[1:]
mesh = create_device_mesh(ici_parallelism=[1, 1], dcn_parallelism=[1, 1])
config = ModelConfig(folder, is_draft_model=True, dtype="float32")
kind, _ = ModelRegistry.resolve_model_cls(config.hf_config.architectures)
with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: kind(config.hf_config, mesh=mesh, dtype=jnp.float32))
    model.load_weights(config)
block, found = model.model.midlayer, {"d2t": model.hot_token_ids.value, "fc": model.model.fc.weight.value}
found |= {"norm": model.model.norm.scale.value, "lm_head": model.lm_head.embedding.value}
for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
    found[f"midlayer.{name}"] = getattr(block, name).scale.value
for name in "qkvo":
    found[f"midlayer.self_attn.{name}_proj"] = getattr(block.self_attn, f"{name}_proj").weight.value
for name in ("gate", "up", "down"):
    found[f"midlayer.mlp.{name}_proj"] = getattr(block.mlp, f"{name}_proj").weight.value
np.savez(out, **{name: np.asarray(value, np.float32) for name, value in found.items()})
