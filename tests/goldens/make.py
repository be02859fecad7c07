"""Makes golden files from NAME.json with torch and transformers: python -m tests.goldens.make [NAME ...]

A NAME.json is a small configuration that keeps the quirks of its family, written as the Hub's config.json
files are (qwen3_next has a large rms_norm_eps: its outputs near zero are divided by their size, which a small
one would leave ill-conditioned). Needs an environment with torch and transformers; the project itself does
without torch.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.goldens import golden
from tests.goldens.values import DOCUMENTS, tensor


def checkpoint_shapes(config: transformers.PretrainedConfig, folder: str) -> dict[str, list]:
    """{name: [shape, dtype]} of the files that transformers itself writes for this model."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: [s.get_shape(), s.get_dtype()] for name, s in slices.items()}


def computed(name: str, raw: dict, tokens: np.ndarray, weights: dict | None = None) -> golden.Golden:
    """What transformers computes with a config.json and `weights` (None: those of their names)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        config = transformers.AutoConfig.from_pretrained(folder)
        shapes = checkpoint_shapes(config, folder)
        weights = weights or {key: tensor(key, tuple(shape), dtype) for key, (shape, dtype) in shapes.items()}
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain).eval()
    layers = config.num_hidden_layers
    aux_layers = (2, layers // 2, layers - 3)
    expected = [run(model, document, aux_layers) for document in np.split(tokens, np.cumsum(DOCUMENTS)[:-1])]
    arrays = {key: np.concatenate([e[key] for e in expected]) for key in expected[0]}
    return golden.Golden(name, raw, shapes, aux_layers, tokens, arrays)


def make(name: str) -> None:
    """Writes one golden."""
    raw = golden.config(name)
    tokens = np.random.RandomState(7).randint(0, raw["vocab_size"], sum(DOCUMENTS)).astype(np.int32)
    made = computed(name, raw, tokens)
    about = {"config": raw, "shapes": made.shapes, "aux_layers": made.aux_layers}
    about["made_with"] = transformers.__version__
    save_file(
        {"tokens": tokens, **made.expected},
        golden.HERE / f"{name}.safetensors",
        {key: json.dumps(value) for key, value in about.items()},
    )
    print(f"{name}: |logits| {np.abs(made.expected['logits']).mean():.3g}")


@torch.no_grad()
def run(model, document: np.ndarray, aux_layers: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Aux states [T, A, H], last hidden state [T, H] and logits [T, V] of one document."""
    out = model(torch.from_numpy(document[None]).long(), output_hidden_states=True, use_cache=False)
    states = [out.hidden_states[k][0].numpy() for k in aux_layers]
    return {
        "aux": np.stack(states, 1),
        "last": out.hidden_states[-1][0].numpy(),
        "logits": out.logits[0].numpy(),
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:] or golden.names():
        make(wanted)
