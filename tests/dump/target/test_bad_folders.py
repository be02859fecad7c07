"""A folder that is not what its files say ends in one line with what was found, what is expected, what to do,
from headers alone: nothing is read, allocated or written."""

import os

import jax
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.safetensors import INDEX, Checkpoint
from dump import target
from dump.target.families import FAMILIES
from dump.target.placing import Placing
from tests.goldens import golden

NAME = "model.layers.5.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sharded model, and no way to read tensors or to put them on a device."""
    whole = golden.write_folder(golden.read("qwen3"), tmp_path)
    found = Checkpoint.open(whole)
    tensors = {name: found.read(name) for name in found.tensors}
    (tmp_path / "model.safetensors").unlink()
    shards = {}
    for name, value in tensors.items():
        shard = "model-1.safetensors" if ".layers.5." in name else "model-2.safetensors"
        shards.setdefault(shard, {})[name] = value
    write(whole, shards)
    monkeypatch.setattr(Placing, "run", None)
    monkeypatch.setattr(jax, "device_put", None)
    return whole


def write(folder: str, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for shard, tensors in shards.items():
        safetensors.write(f"{folder}/{shard}", tensors)
    placed = {name: shard for shard, tensors in shards.items() for name in tensors}
    storage.write_json(f"{folder}/{INDEX}", {"weight_map": placed})


def change(folder: str, edit) -> None:
    """Rewrites the first shard with one tensor edited."""
    found = Checkpoint.open(folder)
    own = {n: found.read(n) for n, t in found.tensors.items() if t.url.endswith("model-1.safetensors")}
    safetensors.write(f"{folder}/model-1.safetensors", own | {NAME: edit(own[NAME])})


def configure(folder: str, **fields) -> None:
    storage.write_json(f"{folder}/config.json", storage.read_json(f"{folder}/config.json") | fields)


def missing_shard(folder: str) -> None:
    os.unlink(f"{folder}/model-1.safetensors")


CASES = {
    "shard": (missing_shard, ["model-1.safetensors", "1 of 2 shards", "fetch the model again"]),
    "shape": (lambda f: change(f, lambda x: x[:, :-1]), [NAME, "[16, 27]", "[16, 28]", "fetch both again"]),
    "dtype": (
        lambda f: change(f, lambda x: x.astype(np.int8)),
        [NAME, "int8", "bfloat16", "fetch both again"],
    ),
    "quantised": (
        lambda f: configure(f, quantization_config={"quant_method": "bitsandbytes"}),
        ["config.json", "'bitsandbytes'", "supported: compressed-tensors, fbgemm_fp8, fp8"],
    ),
    "unquantised": (
        lambda f: configure(f, quantization_config={"quant_method": "fp8"}),
        ["float32", "config.json asks for float8_e4m3fn", "quantization_config"],
    ),
    "code": (
        lambda f: configure(f, auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        ["config.json", "auto_map", "own code", "use a model that needs none"],
    ),
    "family": (
        lambda f: configure(f, architectures=["MambaForCausalLM"]),
        ["MambaForCausalLM", "one that is supported", *FAMILIES],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_is_not_what_it_says_is_refused_in_one_line(case, folder):
    target.check(folder, target.read_config(folder))
    damage, words = CASES[case]
    damage(folder)
    with pytest.raises(EyasError) as error:
        target.check(folder, target.read_config(folder))
    assert "\n" not in str(error.value)
    for word in [str(folder), *words]:
        assert word in str(error.value)
