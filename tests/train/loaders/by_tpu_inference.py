"""python by_tpu_inference.py FOLDER TARGET INPUTS.npz OUT.npz: as the JAX models of tpu-inference read it.

Its loader and its layers run on a CPU; its attention kernel does not, and torchax is not needed: a causal
attention takes the kernel's place. vLLM's own code reads config.json, as the server has it do.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from unittest.mock import MagicMock


class Absent(MetaPathFinder, Loader):
    """Stands for packages of kernels, and of torch on JAX, that this path imports and never calls."""

    def find_spec(self, name, path, target=None):
        return (
            ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ("torchax", "tokamax") else None
        )

    def create_module(self, spec):
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module):
        """Nothing to do."""


sys.meta_path.insert(0, Absent())

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from tpu_inference.models.jax import llama3  # noqa: E402
from tpu_inference.models.jax.llama_eagle3 import EagleLlama3ForCausalLM  # noqa: E402
from vllm.config import ModelConfig  # noqa: E402
from vllm.transformers_utils.configs.eagle import EAGLEConfig  # noqa: E402


def causal(cache, q, k, v, metadata, mesh, head_dim, **_):
    """[T, heads, padded head_dim], in the kernel's place; queries share keys in groups."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, 1).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("tnd,snd->nts", q.astype(jnp.float32), k) * head_dim**-0.5
    scores = jnp.where(jnp.tri(len(q), dtype=bool)[None], scores, -jnp.inf)
    return cache, jnp.einsum("nts,snd->tnd", jax.nn.softmax(scores), v).astype(q.dtype)


def main(folder, target, inputs, out):
    given = np.load(inputs)
    llama3.attention = causal
    quiet = {"dtype": "float32", "skip_tokenizer_init": True}
    model_config, draft = ModelConfig(target, **quiet), ModelConfig(folder, **quiet)
    draft.hf_config = EAGLEConfig(draft.hf_config, method="eagle3", model_type="eagle")
    model_config.dtype = draft.dtype = jnp.bfloat16
    config = SimpleNamespace(
        model_config=model_config,
        speculative_config=SimpleNamespace(draft_model_config=draft, method="eagle3"),
        load_config=SimpleNamespace(download_dir=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "attn_dp", "model"))
    with jax.set_mesh(mesh):
        model = EagleLlama3ForCausalLM(config, jax.random.key(0), mesh)
        model.load_weights(jax.random.key(0))
        model.model.embed_tokens.embedding.value = jnp.asarray(given["embedding"], jnp.bfloat16)
        state = model.combine_hidden_states(
            jnp.asarray(given["aux"].reshape(len(given["aux"]), -1), jnp.bfloat16)
        )
        metadata = SimpleNamespace(input_positions=jnp.arange(len(state), dtype=jnp.int32))
        _, normed, _, _ = model([None], jnp.asarray(given["tokens"]), state, metadata)
        logits = model.compute_logits(normed)
    ids = np.arange(draft.hf_config.draft_vocab_size) + np.asarray(model.draft_id_to_target_id.value)
    named = np.array(draft.hf_config.architectures)  # by which its registry finds the class
    np.savez(out, logits=np.asarray(logits, np.float32)[:, ids], ids=ids, architectures=named)


main(*sys.argv[1:])
