"""Weights are read once, piece by piece, and never lie on the host as a whole."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from common.mesh import make_mesh
from common.safetensors import Checkpoint
from dump import target
from dump.target import placing
from tests.goldens import golden

SIZE_GIB, ROOM_GB = 8, 20


@pytest.mark.parametrize(
    ("name", "experts", "dp", "tp"),
    [
        ("qwen3_moe", "ffn", 1, 2),
        ("qwen3_moe", "expert", 2, 2),
        ("gpt_oss", None, 1, 2),
        ("gemma3", None, 1, 3),
        ("qwen3_next", "ffn", 1, 1),
    ],
)
def test_small_pieces_make_the_same_weights_and_every_byte_is_read_once(
    name, experts, dp, tp, tmp_path, monkeypatch
):
    folder = golden.write_folder(golden.read(name), tmp_path)
    cfg = target.read_config(folder, experts)
    expected = target.load(folder, cfg, make_mesh(dp, tp), jnp.float32)
    read, whole = [], Checkpoint.read

    def count(self, *args):
        value = whole(self, *args)
        read.append(value.nbytes)
        return value

    monkeypatch.setattr(Checkpoint, "read", count)
    monkeypatch.setattr(placing, "PIECE", 300)
    monkeypatch.setattr(placing, "AHEAD", 2)
    found = target.load(folder, cfg, make_mesh(dp, tp), jnp.float32)
    for key, value in expected.items():
        assert found[key].sharding == value.sharding
        np.testing.assert_array_equal(found[key], value)
    assert sum(read) == sum(t.nbytes for t in Checkpoint.open(folder).tensors.values())


def run(*args: object) -> str:
    command = [sys.executable, "-m", "tests.dump.target.large", *map(str, args)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # with optimisations
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_large_checkpoint_takes_its_own_size_and_little_more(tmp_path):
    free = shutil.disk_usage(tmp_path).free / 1e9
    if free < ROOM_GB:
        pytest.skip(f"needs {ROOM_GB} GB of disk, {free:.0f} are free")
    try:
        run("write", tmp_path, SIZE_GIB)
        for dp, tp in ((1, 1), (1, 4)):
            found = json.loads(run("load", tmp_path, dp, tp))
            print(f"dp={dp} tp={tp}: {found}")
            assert found["files"] > 0.95 * SIZE_GIB * 2**30
            assert found["peak"] - found["held"] < 2 * 2**30, found  # the arrays lie in host memory too
            assert found["read"] == pytest.approx(found["held"], rel=0.01), found
    finally:
        shutil.rmtree(tmp_path)
