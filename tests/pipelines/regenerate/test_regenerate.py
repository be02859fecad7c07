"""What is asked, and what is written of the answers."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import EyasError
from common.store import Store
from dump.config import PrepareConfig
from dump.data_files import find_files
from dump.prepare import run as prepare
from tests.dump.chats import write_model
from tests.pipelines.regenerate.asking import SYSTEM, ask, lines, old, only_one, user, write_data
from tests.pipelines.regenerate.chat_server import ANSWERS, CALL, chat_server, good


def test_each_question_is_asked_behind_the_targets_own_answers(config):
    with chat_server() as server:
        found = ask(config, server, temperature=0.5, top_p=0.9, top_k=3, extra='{"min_p": 0.1}')
    assert found["outcomes"] == {"answered": 20}
    assert found["tokens"] == 5 * len(server.requests) == 5 * sum(1 + n % 3 for n in range(20))
    by_messages = {json.dumps(request["messages"]): request for request in server.requests}
    assert len(by_messages) == len(server.requests)
    for n, line in enumerate(lines(config)):
        assert (line["id"], line["number"]) == (f"chat{n}", n)
        asked, expected = [], [SYSTEM] * (n % 2)
        for message in line["messages"]:
            if message["role"] == "assistant":
                request = by_messages[json.dumps(expected)]
                assert message == good(request)["message"] | {"finish_reason": "stop"}
                fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "max_tokens": 4096}
                assert fields.items() <= request.items()
                assert (request["model"], request["stream"]) == ("tiny", False)
            elif message["role"] == "user":
                asked.append(message)
                expected = [*expected, message]
                continue
            expected = [*expected, {"role": message["role"], "content": message["content"]}] * (
                message["role"] == "assistant"
            ) or expected
        assert asked == [user(f"question {n}.{k}?") for k in range(1 + n % 3)]
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == len(server.requests), "every answer has its own"
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(config, expected):
    with chat_server() as one, chat_server() as two:
        ask(config, one, two, concurrency=3)
        assert Path(config.out).read_bytes() == expected
        assert one.requests
        assert two.requests
        os.unlink(config.out)
        os.unlink(config.out.replace(".jsonl", ".settings.json"))
        ask(config, one, seed=1)
    assert Path(config.out).read_bytes() != expected


def test_no_more_requests_are_in_flight_than_wanted(config):
    with chat_server(delay=0.02) as server:
        ask(config, server, concurrency=3)
        assert server.most == 3


@pytest.mark.parametrize(
    ("way", "keep", "outcome", "more"),
    [
        ("length", False, "truncated", None),
        ("length", True, "truncated", {"finish_reason": "length"}),
        ("half thought", True, "truncated", {"content": "", "reasoning": "hm", "finish_reason": "length"}),
        ("filter", True, "refused", None),
        ("refusal", False, "refused", None),
        ("empty", False, "empty", None),
        ("null", False, "empty", None),
        ("thought", False, "empty", None),
        ("bad call", False, "unreadable", None),
        ("call", False, "called", {"tool_calls": [CALL], "content": "", "finish_reason": "tool_calls"}),
        ("parts", False, "answered", {"content": "in parts"}),
        ("reasoning", False, "answered", {"reasoning_content": "so it is", "reasoning": "so it is"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_is_decides_about_its_conversation(config, way, keep, outcome, more, stream):
    assert way in ANSWERS
    turns = user("a?"), old(), user("b?"), old(), user("c?")
    with chat_server(lambda request: way if len(request["messages"]) == 3 else None) as server:
        found = ask(only_one(config, *turns), server, truncated="keep" if keep else "drop", stream=stream)
    assert found["outcomes"] == {outcome: 1}
    assert found["tokens"] == 5 * len(server.requests)
    (line,) = lines(config)
    assert line["outcome"] == outcome
    first, second = user("a?"), user("b?")
    assert [line["messages"][0], line["messages"][2]] == [first, second]
    assert line["messages"][1]["finish_reason"] == "stop"
    assert len(line["messages"]) == (6 if outcome == "answered" else 3 + (more is not None))
    if more:
        assert more.items() <= line["messages"][3].items()


def test_reasoning_is_kept_and_not_sent_back(config):
    with chat_server(lambda request: "reasoning") as server:
        ask(only_one(config, user("a?"), old(), user("b?")), server)
    assert [m["role"] for m in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1].keys() == {"role", "content"}


def test_tools_are_told_and_conversations_whose_tools_are_not_defined_are_left_out(config):
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    result = {"role": "tool", "content": "12"}
    turns = [user("When?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, old()]
    with chat_server() as server:
        found = ask(only_one(config, *turns, tools=[tool]), server)
        assert [request["tools"] for request in server.requests] == [[tool]]
        assert lines(config)[0]["tools"] == [tool]
        assert found["data"] == {"read": 1}
        with pytest.raises(EyasError, match=r"none of 1 records asks anything \(1 tools\)"):
            ask(only_one(replace(config, out=config.out + "2.jsonl"), *turns), server)


def test_questions_of_any_shape_and_max_conversations(config):
    with chat_server() as server:
        records = {"prompt": "a?", "id": "x"}, {"question": "b?", "answer": "c"}, {"prompt": "z?"}, {"n": 1}
        Path(config.data[0]).write_text("\n".join(map(json.dumps, records)))
        found = ask(config, server, max_conversations=2)
        assert [line["id"] for line in lines(config)] == ["x", "chats.jsonl#1"]
        assert found["data"] == {"read": 2}


def test_a_table_of_prompts(config, tmp_path):
    pq.write_table(pa.table({"prompt": ["a?", None, "b?"], "label": [1, 2, 3]}), tmp_path / "prompts.parquet")
    with chat_server() as server:
        found = ask(config, server, data=(str(tmp_path / "prompts.parquet"), config.data[0]))
    assert [line["id"] for line in lines(config)][:3] == ["prompts.parquet#0", "prompts.parquet#2", "chat0"]
    assert found["data"] == {"read": 23, "dropped_malformed": 1}


def test_a_stream_gives_the_same_answers(config, expected):
    with chat_server() as server:
        assert ask(config, server, stream=True)["tokens"] == 5 * len(server.requests)
        assert server.requests[0]["stream_options"] == {"include_usage": True}
    told = [line | {"messages": []} for line in lines(config)]
    assert told == [json.loads(line) | {"messages": []} for line in expected.splitlines()]


def test_prepare_reads_the_answers_and_holds_the_same_chats_out(config, tmp_path):
    def choose(request):
        n = int(request["messages"][-1]["content"].split()[1].split(".")[0])
        return {3: "length", 5: "refusal", 7: "empty", 8: "reasoning"}.get(n)

    write_data(config.data[0], 60)
    with chat_server(choose) as server:
        found = ask(config, server, truncated="keep")
    assert found["outcomes"] == {"answered": 57, "empty": 1, "refused": 1, "truncated": 1}
    model = str(write_model(tmp_path / "model"))
    splits = []
    for number, data in enumerate((config.data[0], config.out)):
        store = str(tmp_path / f"store{number}")
        rows = prepare(PrepareConfig((data,), model, store, length=1024, holdout=0.2))
        splits.append({line["id"]: line["split"] for line in Store.open(store).index().to_pylist()})
    assert rows["counts"]["turns_cut_off"] == 1
    assert rows["counts"]["dropped_no_assistant"] == 2
    assert splits[1].keys() == splits[0].keys() - {"chat5", "chat7"}
    assert splits[1].items() <= splits[0].items()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("answers.jsonl", "answers.settings.json"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    assert find_files((str(folder),)) == [str(folder / "answers.jsonl")]
