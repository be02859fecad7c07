"""The embedded model is right: it knows France's capital and has a sane perplexity on real chats."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from common.mesh import make_mesh
from dump import target

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache():
    from pipelines import embedded

    folder = os.environ.get("EYAS_CACHE", ".cache")
    return embedded.fetch_model(folder), embedded.fetch_conversations(folder)


@pytest.fixture(scope="module")
def model(cache):
    cfg = target.read_config(cache[0])
    weights = target.load(cache[0], cfg, make_mesh(), jnp.float32)

    @jax.jit
    def logits(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        _, last = target.forward(cfg, weights, tokens, jnp.ones_like(tokens), positions, (2,))
        return target.logits(cfg, weights, last)

    return AutoTokenizer.from_pretrained(cache[0]), logits


def test_greedy_answer_names_paris(model):
    tokenizer, logits = model
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    start = len(ids)
    for _ in range(24):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(logits(padded)[0, len(ids) - 1])))
    assert "Paris" in tokenizer.decode(ids[start:])


def test_perplexity_on_real_chats_is_about_nine(model, cache):
    tokenizer, logits = model
    with open(cache[1], encoding="utf-8") as file:
        text = file.read(4_000_000)
    answers = [json.loads(f'"{a}"') for a in re.findall(r'"gpt",\s*"value": "((?:[^"\\]|\\.)*)"', text)]
    rows = [ids[:512] for ids in map(tokenizer.encode, answers[:200]) if len(ids) >= 512][:8]
    tokens = np.array(rows, np.int32)
    scores = jax.nn.log_softmax(logits(tokens)[:, :-1], -1)
    picked = jnp.take_along_axis(scores, jnp.asarray(tokens[:, 1:, None]), -1)
    assert 6 < float(jnp.exp(-picked.mean())) < 13
