"""A model is fetched from the Hub: only what is needed, and what is there already is not fetched again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_llama
from tests.pipelines.hub import serve

REPOSITORY = "owner/model-1B"
WEIGHTS = "model-00001-of-00002.safetensors"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b"{}",
    WEIGHTS: os.urandom(12 << 20),  # the client writes 10 MiB at a time
    "model-00002-of-00002.safetensors": os.urandom(1000),
}
UNWANTED = {"pytorch_model.bin": b"pickle", "README.md": b"# Model", "modeling.py": b"code"}
FETCH = """
import sys
from common.errors import EyasError
from pipelines import recipes
try:
    print(recipes.folder(sys.argv[1], sys.argv[2]))
except EyasError as error:
    print(f"refused: {error}")
"""


@pytest.fixture
def hub():
    with serve(REPOSITORY, FILES | UNWANTED) as server:
        yield server


def start(hub, cache, model: str = REPOSITORY) -> subprocess.Popen:
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{cache}/home", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", FETCH, model, str(cache)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(hub, cache, model: str = REPOSITORY) -> str:
    process = start(hub, cache, model)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out.strip()


def fetched(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def test_only_the_wanted_files_are_fetched_and_only_once(hub, tmp_path):
    folder = fetch(hub, tmp_path)
    assert fetched(folder) == FILES
    assert not any(hub.downloads(name) for name in UNWANTED)
    assert fetch(hub, tmp_path) == folder
    assert [len(hub.downloads(name)) for name in FILES] == [1] * len(FILES)


def test_a_broken_connection_continues_where_it_broke(hub, tmp_path):
    hub.cut[WEIGHTS] = 11 << 20
    assert fetched(fetch(hub, tmp_path)) == FILES
    first, second = hub.downloads(WEIGHTS)
    assert first is None
    assert second == f"bytes={10 << 20}-"


def test_a_killed_fetch_continues_with_the_files_that_are_missing(hub, tmp_path):
    hub.stall.add(WEIGHTS)
    process = start(hub, tmp_path)
    others = set(FILES) - {WEIGHTS}
    assert hub.stalled.wait(60)
    place = tmp_path / "hub" / REPOSITORY
    for _ in range(600):
        if all((place / name).exists() for name in others):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    partial = list(place.rglob("*.incomplete"))
    assert partial
    for path in partial:
        os.utime(path, (0, 0))
    hub.stall.clear()
    assert fetched(fetch(hub, tmp_path)) == FILES
    assert [len(hub.downloads(name)) for name in others] == [1] * len(others)
    assert not list(place.rglob("*.incomplete"))


def test_a_target_too_large_to_answer_here_is_refused_before_its_weights_are_fetched(tmp_path):
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = json.dumps(tiny_llama.CONFIG | size).encode()
    with serve(REPOSITORY, FILES | {"config.json": config}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/home"}
        command = [sys.executable, "-m", "pipelines", "--cache", str(tmp_path), "regenerate"]
        command += ["--data", "q.jsonl", "--out", f"{tmp_path}/a.jsonl", "--model", REPOSITORY]
        command += ["--length", "64"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert "billion parameters, too many to answer here" in done.stderr
        assert "give --endpoint" in done.stderr
        assert hub.downloads("config.json")
        assert not hub.downloads(WEIGHTS)


def test_a_repository_that_is_not_there_is_one_line(hub, tmp_path):
    said = fetch(hub, tmp_path, "owner/other")
    assert said.startswith(
        "refused: owner/other is no folder here and could not be fetched from the Hub (404"
    )
    assert "check the name" in said
    assert "\n" not in said


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    with serve(REPOSITORY, FILES) as gone:
        pass
    said = fetch(gone, tmp_path)
    assert said.startswith(f"refused: {REPOSITORY} is no folder here and could not be fetched")
    assert "\n" not in said
