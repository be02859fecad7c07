"""Target and head measured on prompt sets and on held-out answers, beside what `eval` estimates of them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from common.errors import EyasError
from common.params import initialise
from common.store_writer import write_rows
from dump import target
from dump.chat import Chat
from dump.dump import DumpConfig
from dump.dump import run as dump
from dump.tokenizer_files import tokenizer_hash
from pipelines.decoding.answering import Answer, Answering
from pipelines.decoding.drafting import Drafter, Drafting
from pipelines.decoding.engine import Engine, on_one_device
from pipelines.decoding.sampling import Sampling
from pipelines.speculate.config import SpeculateConfig
from pipelines.speculate.measure import Figures
from pipelines.speculate.run import _unused, run
from pipelines.speculate.table import table
from tests.dump.chats import write_answering_model
from tests.train.heads import kinds, medusa
from tests.train.small_run import short_run
from train.config import EvaluateConfig
from train.evaluate import estimate, load_head
from train.export import export
from train.heads.eagle3.head import Eagle3
from train.run import run as train
from train.source import Source

GREEDY = Sampling()
LENGTH, ANSWER, ROWS = 96, 32, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_answering_model(tmp_path_factory.mktemp("model"), LENGTH, range(40, 44))


@pytest.fixture(scope="module")
def head(model, tmp_path_factory):
    """A random head."""
    config = target.read_config(model).text
    ids = np.arange(0, config["vocab_size"], 2)
    made = Eagle3.for_target(config, len(ids), (2, 4, 5))
    folder = str(tmp_path_factory.mktemp("head") / "head")
    return export(folder, initialise(made.parameters(), jax.random.key(0)), made, ids, config)


def test_prompt_sets_have_figures_by_category_and_context(model, head, tmp_path):
    path = tmp_path / "question.jsonl"
    asked = [{"question_id": n, "category": "ab"[n % 2], "turns": ["Q?"] * (1 + n % 2)} for n in range(5)]
    path.write_text("\n".join(map(json.dumps, asked)))
    config = SpeculateConfig(model, head, prompts=(str(path),), length=LENGTH, max_tokens=8, slots=2)
    config = replace(
        config, steps=2, eagle_topk=2, draft_tokens=5, out=str(tmp_path / "new" / "figures.json")
    )
    found = run(config)
    assert json.loads(Path(config.out).read_text()) == found
    of_set = found["sets"]["question"]
    assert {name: of["prompts"] for name, of in of_set["categories"].items()} == {"a": 3, "b": 2}
    assert of_set["answers"] == 7
    for name in ("prompts", "answers", "tokens", "drafts", "compared", "identical"):
        assert of_set[name] == sum(of[name] for of in of_set["categories"].values()), name
    assert of_set["identical"] == of_set["compared"] == 5
    assert sum(of["drafts"] for of in of_set["by_context"].values()) == of_set["drafts"]
    assert of_set["tokens"] <= of_set["answers"] + of_set["drafts"] * of_set["acceptance_length"] + 1e-6
    assert of_set["speedup"] == pytest.approx(of_set["tokens_per_s"] / of_set["plain_tokens_per_s"])
    for out in (str(path), f"{head}/config.json", f"{model}/config.json"):
        with pytest.raises(EyasError, match="name another place"):
            run(replace(config, out=out))
    text = table(found)
    assert "tree: 2 steps, topk 2, 5 tokens" in text
    assert "5 of 5" in text


def test_sets_of_one_name_have_figures_of_their_own():
    names = []
    for name in ("a", "a (2)", "a", "a", "b"):
        names.append(_unused(name, names))
    assert names == ["a", "a (2)", "a (3)", "a (4)", "b"]


def engine(model, head=(), sampling=GREEDY):
    cfg = target.read_config(model)
    return Engine(cfg, on_one_device(model, cfg, "float32"), 8, LENGTH, sampling, *head)


def write_own_answers(url, model, answers_by, rows, split, stops=frozenset()):
    """Rows of a prompt and what an engine answers, without what it stopped with; returns the answers."""
    chat, rng = Chat.load(model), np.random.default_rng(0)
    answering = Answering(answers_by, stops)
    questions = [[{"role": "user", "content": f"{n}: {rng.integers(10**6)}"}] for n in range(rows)]
    answers = [Answer(chat.prompt(question), n, ANSWER) for n, question in enumerate(questions)]
    left = list(answers)
    while left or answering.busy:
        while left and answering.free:
            answering.begin(left.pop())
        answering.step()
    columns = {name: np.zeros((rows, LENGTH), np.int32) for name in ("tokens", "segment_ids", "positions")}
    columns["loss_mask"] = np.zeros((rows, LENGTH), np.uint8)
    for row, answer in enumerate(answers):
        text = answer.prompt + answer.tokens
        columns["tokens"][row, : len(text)] = text
        columns["segment_ids"][row, : len(text)] = 1
        columns["positions"][row, : len(text)] = np.arange(len(text))
        columns["loss_mask"][row, len(answer.prompt) : len(text)] = 1
    counted = columns["tokens"][columns["loss_mask"] > 0]
    index = {"id": [str(n) for n in range(rows)], "split": split * (rows // len(split))}
    index |= {"row": np.arange(rows), "length": [len(a.prompt + a.tokens) for a in answers]}
    vocab_size = target.read_config(model).vocab_size
    manifest = {"rows": rows, "length": LENGTH, "vocab_size": vocab_size}
    manifest["tokenizer_hash"] = tokenizer_hash(model)
    counts = np.bincount(counted, minlength=vocab_size).astype(np.int64)
    write_rows(url, columns, counts, pa.table(index), manifest)
    dump(DumpConfig(model, url, precision="float32"))
    return answers


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """(a store of the model's own greedy answers, a head that has learnt from it)"""
    folder = tmp_path_factory.mktemp("trained")
    store, run_ = f"{folder}/store", f"{folder}/run"
    stops = Chat.load(model).stops
    write_own_answers(store, model, engine(model), ROWS, ["train", "test"], stops)
    train(short_run(store, run_, steps=40, ttt_steps=3, draft_vocab=128))
    return store, f"{run_}/best"


@pytest.mark.slow
def test_a_chain_on_the_targets_own_answers_gives_what_eval_estimates(model, trained, tmp_path):
    store, head = trained
    config = SpeculateConfig(model, head, store, length=LENGTH, slots=3, max_tokens=ANSWER)
    config = replace(config, out=str(tmp_path / "figures.json"))
    found = run(config)
    measured, walked = found["sets"]["held out"], found["estimate"]
    assert measured["identical"] == measured["compared"] == ROWS // 2
    assert walked["own_text"] == 1
    assert measured["acceptance_length"] > 1.1
    assert measured["drafts"] == walked["drafts"]
    assert measured["acceptance_length"] == pytest.approx(walked["length_greedy"])
    assert measured["accepted"] == pytest.approx(walked["accepted_greedy"])
    tree = run(replace(config, eagle_topk=3, draft_tokens=12))["sets"]["held out"]
    assert tree["identical"] == ROWS // 2
    assert tree["acceptance_length"] > measured["acceptance_length"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["medusa", *kinds.ALL])
def test_another_kind_of_head_drafts_what_eval_estimates(model, trained, tmp_path, monkeypatch, kind):
    """All at once, but for MTP, which reads the last hidden state, of prompts and of what it had accepted; a
    tree of it too."""
    (medusa if kind == "medusa" else kinds).register(monkeypatch)
    store = trained[0]
    learns = {"steps": 60, "ttt_steps": 3, "draft_vocab": 128, "learning_rate": 1e-2, "init": "target"}
    if kind == "medusa":
        train(medusa.Config(store, f"{tmp_path}/run", **learns, blocks=3))
    else:
        train(kinds.Config(store, f"{tmp_path}/run", **learns, kind=kind))
    config = SpeculateConfig(model, f"{tmp_path}/run/best", store, length=LENGTH, slots=3, max_tokens=ANSWER)
    config = replace(config, out=str(tmp_path / "figures.json"))
    found = run(config)
    measured, walked = found["sets"]["held out"], found["estimate"]
    assert measured["identical"] == measured["compared"] == ROWS // 2
    assert measured["drafts"] == walked["drafts"]
    assert measured["accepted"] == pytest.approx(walked["accepted_greedy"])
    assert measured["acceptance_length"] > 1.05
    tree = run(replace(config, eagle_topk=3, draft_tokens=12))["sets"]["held out"]
    assert tree["identical"] == ROWS // 2
    assert tree["acceptance_length"] > measured["acceptance_length"]


@pytest.mark.slow
def test_sampled_drafts_are_accepted_as_often_as_the_walk_through_their_answers_expects(
    model, trained, tmp_path
):
    """The walk knows the answers, not which of their tokens were drafted."""
    head, params, ids = load_head(trained[1], target.read_config(model).text)
    params = {name: jnp.asarray(x) for name, x in params.items()}
    drafter = Drafter(head.ready(params, jnp.float32), head.output(params), jnp.asarray(ids))
    drafts = Drafting(head, steps=3, nodes=4, sampled=True), drafter
    by = engine(model, drafts, Sampling(1.0))
    answers = write_own_answers(f"{tmp_path}/store", model, by, 200, ["test"])
    figures = Figures(3)
    for answer in answers:
        figures.count(answer)
    config = EvaluateConfig(trained[1], f"{tmp_path}/store", 3)
    found = estimate(Source(config.store), config)
    share, drafted = figures.accepted / figures.drafts, figures.drafts
    expected = np.array(found["accepted_drawn"])
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / drafted)).all()
    assert share[0] > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": None}, "give --store, --prompts or both"),
        ({"eagle_topk": 4}, "give --draft-tokens"),
        ({"eagle_topk": 4, "draft_tokens": 3}, "draft_tokens=3 must be 4 to 37"),
        ({"draft_tokens": 8}, "draft_tokens=8 must be 4: the root counts"),
        ({"eagle_topk": 2, "draft_tokens": 6, "sampled_drafts": True, "temperature": 1.0}, "are for chains"),
        ({"sampled_drafts": True}, "sampled_drafts has no meaning at temperature 0"),
        ({"top_k": 5}, "top_k has no meaning at temperature 0"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        SpeculateConfig("model", "head", **{"store": "store"} | changes)
