"""Every recipe is laid out for the target that the Hub has: sizes, mesh and memory, from shapes alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
from transformers import LlamaConfig

from common import storage
from common.mesh import RULES
from dump import target
from dump.dump import DumpConfig
from dump.target.moe import Moe
from pipelines import recipes
from pipelines.bench.published import PUBLISHED
from train.config import TrainConfig
from train.heads.eagle3.head import Eagle3
from train.heads.head import read_serving_config
from train.servers import best
from train.serving_config import canonical_rope

HBM = {"v6e": 32e9, "v5p": 95e9}  # bytes a chip
USABLE = 0.97  # the rest is the runtime's
SPARE = 1.5e9  # a block's outputs, logits, attention scores
SORTED = 2.5e9  # what a layer of experts holds beside its weights, see dump/target/moe.py
TRAINED = 26  # a parameter: float32 weights and moments (12), gradients, their sums, bfloat16 copies
STATES = 10  # copies of the residual stream: kept for aux states, normed, summed


def read(name: str, tmp_path) -> tuple[target.TargetConfig, recipes.Recipe]:
    storage.write_json(f"{tmp_path}/config.json", PUBLISHED[name])
    recipe = recipes.load(name)
    return target.read_config(str(tmp_path), recipe.dump.get("experts")), recipe


def local_bytes(shape, axes, dtype, dp: int, tp: int) -> float:
    """Bytes of one chip's part."""
    parts = math.prod({"dp": dp, "tp": tp}[RULES[axis]] for axis in axes if axis)
    return math.prod(shape) * np.dtype(dtype).itemsize / parts


def layer_bytes(cfg: target.TargetConfig, dp: int, tp: int) -> float:
    """Of the largest layer while it runs: its weights gathered, and those of the next one on their way; the
    quantised ones in bf16 beside them."""

    def size(weights) -> float:
        return sum(
            local_bytes((w.experts or 1, *w.shape), (w.expert_axis, *w.axes), w.dtype or np.float16, 1, tp)
            for w in weights
        )

    def of(layer) -> float:
        plain = layer.plain_weights(tp)
        gathered = size(layer.weights(tp).values()) if dp > 1 else 0.0
        return 2 * gathered + size(plain[name] for name, _ in layer.quantised)

    return max(of(layer) for layer in set(cfg.layers))


def test_every_recipe_but_the_embedded_one_has_its_published_config():
    assert set(PUBLISHED) == set(recipes.names()) - {"smollm2-135m"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_of_its_target(name, tmp_path):
    cfg, recipe = read(name, tmp_path)
    found = (cfg.architecture, cfg.num_layers, cfg.hidden_size, cfg.vocab_size)
    assert found == (recipe.architecture, recipe.layers, recipe.hidden_size, recipe.vocab_size)
    target.check_length(cfg, recipe.prepare["length"])
    target.check_aux_layers(cfg, target.default_aux_layers(cfg.num_layers))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_target_fits_its_slice(name, tmp_path):
    cfg, recipe = read(name, tmp_path)
    config, length = DumpConfig("model", "store", **recipe.dump), recipe.prepare["length"]
    mesh = config.dp, config.tp
    held = target.parameters(cfg, config.tp, config.dp).values()
    weights = sum(local_bytes(p.shape, p.axes, p.dtype or np.float16, *mesh) for p in held)
    tokens = config.batch(length, min(4, config.dp * config.tp)) // config.dp * length
    sparse = any(isinstance(layer.feed_forward, Moe) for layer in cfg.layers)
    states = STATES * tokens * cfg.hidden_size * 2
    head = 2 * cfg.vocab_size * cfg.hidden_size * (config.dp > 1)
    need = weights + states + layer_bytes(cfg, *mesh) + head + SORTED * sparse + SPARE
    limit = HBM[recipe.dump_slice.split("-")[0]] * USABLE
    assert need < limit, f"{name} needs {need / 1e9:.1f} GB a chip ({weights / 1e9:.1f} of weights)"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_head_is_made_and_trained_for_it_on_its_slice(name, tmp_path):
    """From what the store keeps of config.json. Bytes a parameter are those that the TPU compiler takes."""
    cfg, recipe = read(name, tmp_path)
    config = TrainConfig("store", "out", **recipe.train)
    aux = target.default_aux_layers(cfg.num_layers)
    head = Eagle3.for_target(cfg.text, config.draft_vocab, aux, ffn=config.ffn)
    storage.write_json(f"{tmp_path}/head.json", head.serving_config(cfg.text, "bfloat16"))
    again = read_serving_config("head.json", storage.read_json(f"{tmp_path}/head.json"), cfg.num_layers)
    assert again == replace(head, rope=canonical_rope(head.rope))
    LlamaConfig.from_dict(storage.read_json(f"{tmp_path}/head.json"))  # as servers do: it refuses some sizes
    outside = (
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
    )
    found = best(head.limits(cfg.text | {"architectures": [cfg.architecture]}))
    assert found["vllm"].taken is (cfg.architecture not in outside)
    assert found["sglang"].taken
    assert head.ffn >= 2 * head.hidden_size or head.hidden_size > 5_000

    count = sum(math.prod(p.shape) for p in head.parameters().values())
    kept = 2 * head.ffn + 2 * (head.num_heads + head.num_kv_heads) * head.head_dim + 2 * head.hidden_size
    tokens = config.batch_rows // config.dp * recipe.prepare["length"]
    need = TRAINED * count + 2 * tokens * config.ttt_steps * kept + 2 * head.vocab_size * head.hidden_size
    limit = HBM[recipe.train_slice.split("-")[0]] * USABLE
    assert need < limit, f"{name} needs {need / 1e9:.1f} GB a chip for a head of {count / 1e6:.0f}M"


SIZES = {  # billions of parameters, as the models' pages have them
    "llama-3.2-3b": 3.2,
    "qwen2.5-72b-fp8": 72.7,
    "qwen3-32b": 32.8,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "qwen3-coder-next": 80,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
    "glm-4.7-flash": 30,
    "glm-5-fp8": 744,
    "minimax-m2": 229,
    "gemma-3-27b": 27,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_declared_weights_are_as_many_as_the_model_has(name, tmp_path):
    cfg, _ = read(name, tmp_path)
    held = target.parameters(cfg).items()
    count = sum(math.prod(p.shape) for key, p in held if not key.endswith(".scale"))
    assert count / 1e9 == pytest.approx(SIZES[name], rel=0.02)
