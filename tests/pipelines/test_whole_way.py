"""Conversations to a checked head, through the command line, on a random target of eight layers."""

import json
import os
from pathlib import Path

from click.testing import CliRunner

from common import storage
from pipelines import cli
from tests import tiny_llama
from tests.dump import chats

CHATS = str(Path(__file__).parents[1] / "data" / "chats.jsonl")


def write_target(folder):
    """A random Llama that has the byte tokenizer and a chat template."""
    chats.write_model(folder, max_position_embeddings=512)
    tiny_llama.write_weights(str(folder))


def invoked(*args):
    result = CliRunner().invoke(cli.main, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def eyas(*args):
    return invoked(*args).stdout


def test_the_whole_way_from_conversations_to_a_checked_head(tmp_path, monkeypatch):
    """Paths are written in all the ways that people write them."""
    here = tmp_path / "a b" / "ö"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    write_target(here / "model")
    place = ("--model", "./model/", "--store", "../x/../störe/")
    counts = json.loads(eyas("prepare", *place, "--data", CHATS, "--length", 256, "--holdout", 0.2))
    assert counts["read"] == counts["kept"] + sum(n for name, n in counts.items() if "dropped_" in name)
    again = invoked("dump", *place, "--data", "other.jsonl", "--block-rows", 4)
    assert "störe/ has its rows already from chats.jsonl: --data is not read" in again.stderr
    dumped = json.loads(again.stdout)
    assert dumped["blocks_before"] == 0
    store = here.parent / "störe"
    place = ("--model", f"file://{here}/model", "--store", f"file://{store}")
    assert json.loads(eyas("dump", *place, "--block-rows", 4))["blocks_before"] == dumped["blocks"]
    assert json.loads(eyas("verify", "--store", f"{store}//"))["missing_blocks"] == 0
    few = ("--steps", 4, "--batch-rows", 2, "--draft-vocab", 64, "--ttt-steps", 3)
    eyas("train", *place, "--out", "~/../run", *few)
    run = here.parent / "run"
    found = json.loads(eyas("eval", "--head", run / "best", "--store", store, "--ttt-steps", 3, "--json"))
    assert len(found["head"]["acc"]) == 3
    assert 1 <= found["head"]["length_greedy"] <= 4
    head = ("--head", "../run/best/", "--store", "../störe")
    assert "bigram" in eyas("eval", *head, "--ttt-steps", 3)
    assert "target: the head fits it" in eyas("export", *head, "--out", "~/head")
    assert sorted(os.listdir(here / "head")) == ["README.md", "config.json", "model.safetensors"]
    assert storage.read_json(str(here / "head" / "config.json"))["draft_vocab_size"] == 64
    assert sorted(os.listdir(here)) == ["head", "model"]
    assert sorted(os.listdir(here.parent)) == ["run", "störe", "ö"]
