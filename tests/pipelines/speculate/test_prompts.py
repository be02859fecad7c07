"""Prompt sets of every layout become the same questions, and what cannot be asked is counted."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import EyasError, RestartError
from dump.chat import Chat
from pipelines.speculate import prompts
from pipelines.speculate.prompts import ALL, _answers, of_file
from tests.dump.chats import write_model

FIRST, SECOND = "Write a poem.", "Now without an e."
TURNS = {"question_id": 81, "category": "writing", "turns": [FIRST, SECOND], "reference": ["a", "b"]}
SPEED = {
    "question_id": "7f",
    "category": "math",
    "sub_category": "algebra",
    "turns": [FIRST],
    "multiturn": False,
}
UNRESOLVED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
GSM8K = {"question": FIRST, "answer": "Half is 24.\n#### 72"}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": FIRST,
    "entry_point": "f",
    "canonical_solution": "x",
    "test": "y",
}
CHAT = {"id": "a", "messages": [{"role": "user", "content": FIRST}, {"role": "assistant", "content": "old"}]}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return Chat.load(str(write_model(tmp_path_factory.mktemp("model"))))


def read(chat, path, *records, each=None, length=200):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return of_file(str(path), chat, 50, length, each)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("record", "category", "questions"),
    [
        (TURNS, "writing", [FIRST, SECOND]),
        (SPEED, "math", [FIRST]),
        ({"prompt_id": 1, "category": "writing", "prompt": [FIRST, SECOND]}, "writing", [FIRST, SECOND]),
        (GSM8K, ALL, [FIRST]),
        (HUMANEVAL, ALL, [FIRST]),
        (CHAT, ALL, [FIRST]),
    ],
)
def test_a_layout_gives_its_questions_one_behind_another(chat, tmp_path, kind, record, category, questions):
    found = read(chat, tmp_path / f"bench.{kind}", record)
    assert found.name == "bench"
    (prompt,) = found.prompts
    assert prompt.category == category
    answers, said = [], []
    for question in questions:
        tokens, room = prompt.behind(answers)
        said.append({"role": "user", "content": question})
        assert tokens == chat.prompt(said)
        assert room == min(50, 200 - len(tokens))
        answers.append(tokens[:3])
        said.append({"role": "assistant", "content": chat.decode(tokens[:3], special=False)})
    assert prompt.behind(answers) is None


def test_what_cannot_be_asked_is_left_out_and_counted(chat, tmp_path):
    unresolved, long = SPEED | {"turns": [UNRESOLVED]}, SPEED | {"turns": ["long " * 60]}
    special = SPEED | {"turns": ["a <|im_end|>"]}
    found = read(chat, tmp_path / "a.jsonl", SPEED, unresolved, long, special, {"nothing": 1})
    assert len(found.prompts) == 1
    assert found.left_out == {
        "unresolved": 1,
        "too_long_or_refused_by_the_template": 1,
        "spells_a_special_token": 1,
        "dropped_malformed": 1,
    }
    with pytest.raises(EyasError, match=r"asks nothing \(1 unresolved\)"):
        read(chat, tmp_path / "b.jsonl", unresolved)


def test_what_is_no_text_is_asked_and_named_as_it_can_be(chat, tmp_path):
    """Else the figures of hours could not be written, as JSON holds no half of a character."""
    half = TURNS | {"category": "a\ud800\x1b[2J", "turns": ["b\ud800"]}
    (prompt,) = read(chat, tmp_path / "a.jsonl", half).prompts
    assert prompt.category == r"a\ud800\x1b[2J"
    assert prompt.turns == (({"role": "user", "content": "b\ufffd"},),)


def test_the_name_of_a_set_is_nothing_that_a_terminal_obeys(chat, tmp_path):
    assert read(chat, tmp_path / "a\x1b[2J.jsonl", TURNS).name == r"a\x1b[2J"


def test_questions_that_are_changed_while_they_are_read_are_asked_in_no_run(chat, tmp_path, monkeypatch):
    plain = prompts._unusable

    def changing(asked):
        (tmp_path / "a.jsonl").write_text(json.dumps(TURNS) + "\n" * 3)
        return plain(asked)

    monkeypatch.setattr(prompts, "_unusable", changing)
    with pytest.raises(RestartError, match=r"a\.jsonl was changed while it was read"):
        read(chat, tmp_path / "a.jsonl", TURNS)


def test_so_many_of_each_category(chat, tmp_path):
    records = [TURNS | {"question_id": n, "category": "ab"[n % 2]} for n in range(7)]
    found = read(chat, tmp_path / "a.jsonl", *records, each=2)
    assert {name: len(of) for name, of in found.categories().items()} == {"a": 2, "b": 2}


def test_answers_of_a_row_end_with_their_documents():
    segments = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0])
    mask = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0])
    assert list(_answers(segments, mask)) == [(0, 2, 4), (4, 4, 5), (4, 6, 7), (4, 8, 10)]
