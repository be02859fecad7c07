"""What prepare says of its rows: how full they are, who is held out, what the template had no place for."""

import json
import re
from dataclasses import replace

import pytest

from common.store import Store
from dump.prepare import PrepareConfig, run
from tests.dump.chats import write_model


@pytest.fixture
def config(tmp_path):
    model = str(write_model(tmp_path / "chatml"))
    return PrepareConfig(("-",), model, str(tmp_path / "store"), length=256)


QUESTIONS = [
    {
        "id": f"q{i}",
        "messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i) * 40}],
    }
    for i in range(100, 400)
]


def prepared(config, tmp_path, records, **settings):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return run(replace(config, data=(str(path),), **settings))


def test_rows_that_are_not_full_are_warned_of_and_a_length_is_advised(config, tmp_path, capfd):
    rows = prepared(config, tmp_path, QUESTIONS, length=256, holdout=0)
    assert rows["fill"] < 0.9
    warning = capfd.readouterr().err
    advised = int(re.search(r"rows are only \d+% full; --length (\d+) fills about", warning)[1])
    better = prepared(config, tmp_path, QUESTIONS, length=advised, holdout=0, store=config.store + "2")
    assert better["fill"] > 0.9
    assert better["counts"]["truncated"] == 0
    assert "only" not in capfd.readouterr().err


def test_few_conversations_cannot_fill_a_row_of_any_length(config, tmp_path, capfd):
    prepared(config, tmp_path, QUESTIONS[:1], length=192, holdout=0)
    assert "more conversations would fill them" in capfd.readouterr().err


def test_ids_that_name_a_corpus_do_not_make_one_chat_of_it(config, tmp_path, capfd):
    names = [f"{corpus}_{i:06d}" for corpus in ("local", "another", "corpus7") for i in range(100)]
    records = [record | {"id": name} for record, name in zip(QUESTIONS, names, strict=True)]
    prepared(config, tmp_path, records, holdout=0.1)
    index = Store.open(config.store).index().to_pylist()
    for corpus in ("local", "another", "corpus7"):
        held = [line["split"] == "test" for line in index if line["id"].startswith(corpus)]
        assert 2 < sum(held) < 20
    assert "was asked for" not in capfd.readouterr().err


def test_a_share_far_from_the_one_asked_for_is_said(config, tmp_path, capfd):
    chats = ["aaaaaaa", "bbbbbbb", "ccccccc"]
    records = [r | {"id": f"{chats[i % 3]}_{i // 3}"} for i, r in enumerate(QUESTIONS[:60])]
    prepared(config, tmp_path, records, holdout=0.1)
    assert "66.7% of the conversations are held out, where 10.0% was asked for" in capfd.readouterr().err


def test_what_the_template_has_no_place_for_is_counted_and_said(config, tmp_path, capfd):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    )
    records = [json.loads(json.dumps(record)) for record in QUESTIONS[:8]]
    records[0]["messages"][1]["reasoning"] = "I count."
    records[1]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    records[2]["messages"].insert(1, {"role": "tool", "content": "12:00"})
    records[3]["tools"] = [{"name": "clock"}]
    records[4]["messages"][1]["weight"] = 0
    records[5]["text"] = records[5].pop("messages")[0]["content"]
    model = str(write_model(tmp_path / "model", template))
    counts = prepared(config, tmp_path, records, model=model, holdout=0)["counts"]
    found = {name: n for name, n in counts.items() if n and name.startswith(("dropped_", "turns_"))}
    assert found == {
        "dropped_tools": 2,
        "dropped_nothing_counted": 1,
        "dropped_malformed": 1,
        "turns_reasoning": 1,
        "turns_reasoning_removed": 1,
        "turns_system_folded": 1,
        "turns_masked": 1,
    }
    printed = capfd.readouterr().err
    assert "2 conversations with tools are left out" in printed
    assert "1 system turns stand in front of the first question" in printed
    assert "1 turns lose their reasoning" in printed
    assert "1 records have a shape that is not read: the first is an object with id, text" in printed
