"""The whole of prepare, on the chat file and on unusable input."""

import gzip
import hashlib
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common import storage
from common.errors import EyasError, RestartError
from common.store import Store
from dump import prepare
from dump.chat import Chat
from dump.prepare import PrepareConfig, _portable, read_vocab_size, run
from pipelines.bench.published import PUBLISHED
from tests.dump.chats import CHATML, CHATS, chat, write_model


@pytest.fixture
def config(prepare_config):
    return prepare_config


def contents(folder):
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(p, folder): hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths}


def test_the_store_holds_the_answers_of_the_chat_file(config, capfd):
    rows = run(config)
    store = Store.open(config.store)
    arrays = store.read(["tokens", "segment_ids", "positions", "loss_mask"], np.arange(store.rows))
    chat = Chat.load(config.model)
    found = {}
    for line in store.index().to_pylist():
        place = (line["row"], slice(line["start"], line["start"] + line["length"]))
        kept = arrays["loss_mask"][place] == 1
        assert kept.sum() == line["counted"] > 0
        found[line["id"]] = chat.decode(arrays["tokens"][place][kept].tolist())
    assert (
        found["alias01_0"]
        == "Jupiter, with eleven times the diameter of the Earth.<|im_end|>Mercury.<|im_end|>"
    )
    assert found["chats.jsonl#9"] == "Se dice «puente».<|im_end|>「橋」（はし）です。🌉<|im_end|>"
    assert found["garden1_1"].startswith("Mostly the carrot fly.")
    assert rows["counted"] == arrays["loss_mask"].sum()
    assert rows["tokens"] == (arrays["segment_ids"] > 0).sum()
    assert rows["fill"] == rows["tokens"] / arrays["tokens"].size
    assert rows["counts"]["kept"] == len(found)
    lost = sum(n for name, n in rows["counts"].items() if name.startswith("dropped_"))
    assert rows["counts"]["read"] == rows["counts"]["kept"] + lost == 34
    assert rows["counts"]["dropped_special_token"] == 1
    assert rows["counts"]["truncated"] > 0
    printed = capfd.readouterr().err
    assert "conversations: 34 read" in printed
    assert "dropped_duplicate 1" in printed


def test_splits_are_kept_apart_and_counted_tokens_are_of_train(config):
    run(config)
    store = Store.open(config.store)
    train, test = store.split_rows("train"), store.split_rows("test")
    assert len(train) > 0
    assert len(test) > 0
    assert sorted([*train, *test]) == list(range(store.rows))
    chunks = [line for line in store.index().to_pylist() if line["id"].startswith("garden1_")]
    assert len(chunks) == 3
    assert len({line["split"] for line in chunks}) == 1
    arrays = store.read(["tokens", "loss_mask"], train)
    counted = np.bincount(
        arrays["tokens"][arrays["loss_mask"] == 1], minlength=store.manifest["rows"]["vocab_size"]
    )
    np.testing.assert_array_equal(store.token_counts(), counted)


def test_the_same_input_gives_the_same_bytes_elsewhere_on_one_core(config, tmp_path):
    run(config)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "chats.jsonl").write_bytes(CHATS.read_bytes())
    arguments = (
        (str(copy / "chats.jsonl"),),
        config.model,
        str(copy / "store"),
        config.length,
        config.holdout,
    )
    code = (
        "import sys; from dump.prepare import PrepareConfig, run; "
        f"run(PrepareConfig(*{arguments!r})); assert not {{'jax', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"RAYON_NUM_THREADS": "1"})
    first = contents(config.store)
    assert first == contents(copy / "store")
    assert len(first) > 6


def test_nothing_of_the_conversations_or_of_this_machine_is_in_the_manifest(config, tmp_path):
    run(config)
    manifest = (Path(config.store) / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert "carrot" not in manifest
    signed = PrepareConfig(("https://me:secret@host/chats.jsonl?sig=secret",), config.model, config.store)
    assert _portable(signed)["data"] == ["chats.jsonl"]


def test_a_prepared_store_is_left_alone_and_another_configuration_is_refused(config, tmp_path, capfd):
    first = run(config)
    before = contents(config.store)
    assert run(config) == first
    assert "already prepared" in capfd.readouterr().err
    for field, value in (("length", 128), ("seed", 1), ("holdout", 0.3), ("max_conversations", 5)):
        with pytest.raises(EyasError, match=f"{field}: .* there, {value} here"):
            run(replace(config, **{field: value}))
    changed = tmp_path / "chats.jsonl"
    changed.write_bytes(CHATS.read_bytes() + b"\n{}\n")
    with pytest.raises(EyasError, match=r"prepared in another way: data"):
        run(replace(config, data=(str(changed),)))
    other = write_model(tmp_path / "other", CHATML.replace("assistant", "model"))
    with pytest.raises(EyasError, match="template_hash"):
        run(replace(config, model=str(other)))
    assert contents(config.store) == before


def test_an_interrupted_prepare_is_run_again(config):
    run(config)
    before = contents(config.store)
    os.unlink(os.path.join(config.store, "manifest.json"))
    run(config)
    assert contents(config.store) == before


def test_max_conversations_counts_usable_ones(config):
    rows = run(replace(config, max_conversations=20))
    assert rows["counts"]["read"] == 23
    assert rows["counts"]["kept"] == 20


def test_data_that_grow_while_they_are_read_are_told_of(config, tmp_path, monkeypatch):
    """Of answers that are still being made, say: the manifest would have the sum of a part of them."""
    data = tmp_path / "chats.jsonl"
    data.write_bytes(CHATS.read_bytes())
    real = prepare._require_spill_room

    def grown(*args):
        with data.open("ab") as file:
            file.write(CHATS.read_bytes().splitlines(keepends=True)[0])
        real(*args)

    config = replace(config, data=(str(data),))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_require_spill_room", grown)
        with pytest.raises(RestartError, match=r"chats.jsonl was changed while it was read; run the same"):
            run(config)
    assert storage.list_names(config.store) == []
    assert run(config)["data"][0]["bytes"] == data.stat().st_size


def test_a_template_that_runs_away_again_and_again_ends_the_run(config, tmp_path):
    bomb = "{% if messages[0].content != 'Which colour?' %}{{ 'x' * 10**11 }}{% endif %}"
    template = CHATML + bomb  # the plain conversation that every template is tried with asks for a colour
    with pytest.raises(EyasError, match=r"ran away in 3 conversations \(it needs too much memory\)"):
        run(replace(config, model=str(write_model(tmp_path / "model", template))))
    assert not os.path.exists(config.store)


def test_a_template_that_refuses_some_conversations_says_why_once(config, tmp_path, capfd):
    refusal = "{{ raise_exception('no planets, please') }}"
    template = "{% if 'planet' in messages[0].content %}" + refusal + "{% endif %}" + CHATML
    rows = run(replace(config, model=str(write_model(tmp_path / "model", template))))
    assert rows["counts"]["dropped_template_refused"] == 1
    assert capfd.readouterr().err.count("no planets, please") == 1


def test_a_packed_file_a_folder_and_a_table_give_the_same_rows(config, tmp_path):
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(CHATS.read_bytes()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "chats.jsonl").write_bytes(CHATS.read_bytes())
    arrays = []
    for number, data in enumerate((str(CHATS), str(tmp_path / "packed.jsonl.gz"), str(folder))):
        run(replace(config, data=(data,), store=f"{config.store}{number}", holdout=0))
        store = Store.open(f"{config.store}{number}")
        arrays.append(store.read(["tokens", "loss_mask"], np.arange(store.rows)))
    for other in arrays[1:]:
        for name in other:
            np.testing.assert_array_equal(arrays[0][name], other[name])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", "\n\n", "no conversations found"),
        ("none.json", "[]", "no conversations found"),
        (
            "asked.jsonl",
            chat(("human", "a secret?")),
            "none of 1 conversations has an answer .*1 no_assistant",
        ),
        (
            "other.jsonl",
            '{"text": "a secret"}\n' * 3,
            "the first record is an object with text; expected a list",
        ),
        (
            "turns.jsonl",
            chat(("human", 7), ("gpt", "a")),
            "one with a turn that is an object with from, value",
        ),
        ("bad.jsonl", chat(("human", "q"), ("gpt", "a")) + "\n{a secret\n", "1 of 2 lines .* line 2"),
        ("late.jsonl", chat(("human", "secret " * 99), ("gpt", "a")), "none of 1 .*1 nothing_counted"),
        ("one.jsonl", chat(("human", "q"), ("gpt", "a")), "one conversation cannot be split"),
    ],
)
def test_data_without_anything_to_learn_is_refused_before_a_store_is_made(
    config, tmp_path, name, text, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(EyasError, match=message) as error:
        run(replace(config, data=(str(tmp_path / name),)))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not os.path.exists(config.store)


def test_a_store_among_its_own_data_is_refused(config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_bytes(CHATS.read_bytes())
    with pytest.raises(EyasError, match=r"store/manifest.json would be data of .*data itself"):
        run(replace(config, data=(f"{tmp_path}/data",), store=f"{tmp_path}/data/store"))
    assert os.listdir(tmp_path / "data") == ["chats.jsonl"]


def test_a_folder_that_is_no_store_is_not_written_into(config, tmp_path):
    os.mkdir(config.store)
    (Path(config.store) / "thesis.txt").write_text("years of work")
    with pytest.raises(EyasError, match=r"no store and not empty \(it has thesis\.txt\)"):
        run(config)
    assert os.listdir(config.store) == ["thesis.txt"]


@pytest.mark.parametrize("place", ["", "/sub/store"])
def test_a_file_where_the_store_should_go_is_refused_before_reading(config, capfd, place):
    Path(config.store).write_text("years of work")
    with pytest.raises(EyasError, match="is a file; name another place"):
        run(replace(config, store=config.store + place))
    assert "read and tokenise" not in capfd.readouterr().err
    assert Path(config.store).read_text() == "years of work"


@pytest.mark.parametrize(
    ("free", "what"), [(1000, "the tokens, until they are packed,"), (50_000, "the rows")]
)
def test_a_disk_without_room_is_refused_before_a_store_is_made(config, monkeypatch, free, what):
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(EyasError, match=rf"^{what} need \d.*B, the disk of .* has .*B left; make room there"):
        run(config)
    assert not os.path.exists(config.store)


def test_a_multimodal_targets_vocabulary_is_its_text_parts_even_where_the_file_leaves_it_out(tmp_path):
    storage.write_json(f"{tmp_path}/config.json", PUBLISHED["gemma-3-4b"])
    assert read_vocab_size(str(tmp_path)) == 262_208


@pytest.mark.parametrize(
    "config",
    [
        [],
        5,
        None,
        {"vocab_size": "7"},
        {"vocab_size": True},
        {"text_config": []},
        {"text_config": {"model_type": 3}},
        {"text_config": {}},
        {"text_config": {}, "model_type": "of_tomorrow"},
        {},
    ],
)
def test_a_config_json_of_other_types_is_one_line(config, tmp_path):
    storage.write_json(f"{tmp_path}/config.json", config)
    with pytest.raises(EyasError, match=r"config\.json.*it is not the folder of a language model$"):
        read_vocab_size(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"vocab_size": 100}, "do not belong together"), ({"vocab_size": None}, "vocab_size is null")],
)
def test_a_tokenizer_of_another_model_is_refused(config, tmp_path, settings, message):
    model = write_model(tmp_path / "model", **settings)
    with pytest.raises(EyasError, match=message):
        run(replace(config, model=str(model)))
    assert not os.path.exists(config.store)


def test_a_model_without_config_is_refused(config, tmp_path):
    with pytest.raises(EyasError, match=r"config\.json is missing"):
        run(replace(config, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", ()),
        ("data", "chats.jsonl"),
        ("model", ""),
        ("store", ""),
        ("length", 4),
        ("holdout", 1.0),
        ("holdout", -0.1),
        ("seed", -1),
        ("max_conversations", 0),
    ],
)
def test_the_configuration_names_the_field_that_is_wrong(config, field, value):
    with pytest.raises(ValueError, match=f"^{field}=.* must be "):
        replace(config, **{field: value})
