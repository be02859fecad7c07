"""A small target answers by itself: as a whole pass would, and the same however many answers grow at once."""

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import EyasError, MachineError
from common.mesh import make_mesh
from dump import target
from dump.chat import Chat
from pipelines.decoding.engine import Engine
from pipelines.regenerate import local
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.run import run
from tests import tiny_llama
from tests.dump.chats import write_answering_model
from tests.pipelines.regenerate.asking import SYSTEM, lines, old, only_one, record, user, write_data

LENGTH = 192


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_answering_model(tmp_path_factory.mktemp("model"), LENGTH, range(40, 60))


@pytest.fixture
def config(tmp_path, model):
    data = write_data(tmp_path / "chats.jsonl", 6)
    out = str(tmp_path / "answers.jsonl")
    more = {"max_tokens": 12, "length": LENGTH, "slots": 3, "truncated": "keep"}
    return RegenerateConfig((data,), out, model=model, **more)


def bytes_of(config, **changes):
    config = replace(config, **changes)
    run(config)
    return Path(config.out).read_bytes()


def test_greedy_answers_are_the_likeliest_tokens_of_whole_passes(config, model):
    run(config)
    cfg, chat = target.read_config(model), Chat.load(model)
    weights = target.load(model, cfg, make_mesh(), jnp.float32)

    @jax.jit
    def next_token(tokens, length):
        row = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        segments = (row < length).astype(jnp.int32)
        _, last = target.forward(cfg, weights, tokens, segments, row, (2, 4, 5))
        return jnp.argmax(target.logits(cfg, weights, last)[0], -1)

    finished = set()
    for line in lines(config):
        for at in (i for i, m in enumerate(line["messages"]) if m["role"] == "assistant"):
            tokens = chat.prompt([{k: m[k] for k in ("role", "content")} for m in line["messages"][:at]])
            answer, finish = [], "length"
            while len(answer) < config.max_tokens and finish != "stop":
                row = np.zeros((1, LENGTH), np.int32)
                row[0, : len(tokens + answer)] = tokens + answer
                found = int(next_token(row, len(tokens + answer))[len(tokens + answer) - 1])
                finish = "stop" if found in chat.stops else "length"
                answer += [found] if finish == "length" else []
            message = line["messages"][at]
            assert message["content"] == chat.decode(answer, special=False)
            assert message["finish_reason"] == finish
            finished.add(finish)
    assert finished == {"stop", "length"}, "both ends occur"


@pytest.mark.slow
def test_answers_do_not_depend_on_what_is_answered_beside_them(config, tmp_path):
    sampled = {"temperature": 1.0, "top_p": 0.95, "top_k": 50}
    together = bytes_of(config, **sampled)
    alone = bytes_of(config, **sampled, slots=1, out=str(tmp_path / "alone.jsonl"))
    assert alone == together
    assert bytes_of(config, **sampled, seed=1, out=str(tmp_path / "other.jsonl")) != together
    kept = together.splitlines(keepends=True)[3:5]
    Path(config.out).write_bytes(b"".join(kept))
    assert bytes_of(config, **sampled) == together, "a resumed run gives the same"


def test_what_made_the_answers_is_recorded_and_another_target_refused(config, model, tmp_path):
    run(config)
    assert record(config)["settings"]["target"]["length"] == LENGTH
    other = tmp_path / "other"
    other.mkdir()
    for name in os.listdir(model):
        (other / name).write_bytes((Path(model) / name).read_bytes())
    tiny_llama.write_weights(str(other), seed=1)
    with pytest.raises(EyasError, match="answered in another way"):
        run(replace(config, model=str(other)))


def test_what_it_cannot_answer_is_rejected_and_says_why(config):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    rejected = {
        "which only a server|only a server reads": ([user("When?")], {"tools": [tool]}),
        "tokens and --length is 192": ([user("long " * 60)], {}),
        "spells a special token": ([SYSTEM, user("a <|im_end|>"), old()], {}),
    }
    for number, (reason, (turns, fields)) in enumerate(rejected.items()):
        one = only_one(replace(config, out=f"{config.out}{number}.jsonl"), *turns, **fields)
        assert run(one)["outcomes"] == {"rejected": 1}
        assert any(part in lines(one)[0]["reason"] for part in reason.split("|"))


def test_a_large_target_is_told_of_servers_and_nothing_is_written(config, monkeypatch):
    monkeypatch.setattr(local, "LARGEST", 1000)
    with pytest.raises(EyasError, match=r"too many to answer here.*vllm serve.*--endpoint"):
        run(config)
    assert not os.path.exists(config.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "nobody answers"),
        ({"endpoint": ("http://localhost:1",), "served_model": "x"}, "one of the two answers"),
        ({"model": None, "endpoint": ("http://localhost:1",)}, "give --served-model"),
        ({"extra": "{}"}, "extra is for servers"),
        ({"stream": True}, "stream is for servers"),
        ({"concurrency": 2}, "concurrency is for servers"),
        ({"top_p": 0.9}, "top_p has no meaning at temperature 0"),
        ({"model": None, "endpoint": ("http://localhost:1",), "served_model": "x"}, "slots is for a model"),
    ],
)
def test_who_answers_is_one(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_longer_than_the_target_is_made_for(config):
    with pytest.raises(EyasError, match=f"made for {LENGTH} tokens; give --length {LENGTH}"):
        run(replace(config, length=LENGTH + 1))


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(config, model):
    torch = pytest.importorskip("torch", reason="compares with transformers' generate, which needs torch")
    from transformers import AutoModelForCausalLM

    run(config)
    chat = Chat.load(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for line in lines(config):
        for at in (i for i, m in enumerate(line["messages"]) if m["role"] == "assistant"):
            prompt = chat.prompt([{k: m[k] for k in ("role", "content")} for m in line["messages"][:at]])
            found = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=config.max_tokens, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            answer = [token for token in found if token not in chat.stops]
            assert line["messages"][at]["content"] == chat.decode(answer, special=False)


def test_a_device_that_fails_ends_the_run_and_what_was_answered_stays(config, monkeypatch):
    run(config)
    whole = Path(config.out).read_bytes()
    Path(config.out).write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    step, steps = Engine.step, iter(range(10**6))

    def fails(engine):
        if next(steps) == 20:
            raise MachineError("the chip is gone")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fails)
    with pytest.raises(MachineError, match="the chip is gone"):
        run(replace(config, slots=1))
    assert 2 < len(lines(config)) < 6
    monkeypatch.undo()
    assert bytes_of(config) == whole
