"""Small records laid out as published data sets lay out theirs; each becomes the same conversation."""

import copy
import datetime
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dump.chat import Chat
from dump.clean import Cleaner
from dump.conversations import DataFile
from tests.dump.chats import write_model
from tests.dump.test_dialect import PARALLEL

Q, A = "Why is the sky blue?", "Blue light scatters most."
PLAIN = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
THOUGHT = "Rayleigh: by the fourth power."
THINKS = [PLAIN[0], PLAIN[1] | {"reasoning": THOUGHT}]
TWICE = [
    *PLAIN,
    {"role": "user", "content": "And at dusk?"},
    {"role": "assistant", "content": "Red is left."},
]
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}
CALLS = [
    {"role": "user", "content": Q},
    {"role": "assistant", "content": "", "calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": A},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
BARE = TOOLS[0]["function"]


def gpt(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


DUSK = ("And at dusk?", "Red is left.")
THINK = f"<think>\n{THOUGHT}\n</think>\n\n{A}"

SHAPES = {
    "ShareGPT": ({"id": "a", "conversations": gpt(Q, A)}, PLAIN),
    "UltraChat 200k": ({"prompt": Q, "prompt_id": "f0", "messages": chat(Q, A, *DUSK)}, TWICE),
    "UltraChat": ({"id": "7", "data": [Q, A, *DUSK]}, TWICE),
    "PerfectBlend": ({"conversations": gpt(Q, A), "source": "MetaMathQA"}, PLAIN),
    "Magpie": (
        {
            "uuid": "u",
            "instruction": Q,
            "response": A,
            "conversations": gpt(Q, A),
            "task_category": "Science",
        },
        PLAIN,
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief.", "weight": None},
                {"from": "human", "value": Q, "weight": 0.0},
                {"from": "gpt", "value": A, "weight": 1.0},
            ]
        },
        SYSTEM,
    ),
    "OpenHermes": (
        {"id": None, "system_prompt": None, "title": None, "skip_prompt_formatting": False}
        | {"conversations": [{"from": "system", "value": "Be brief."}, *gpt(Q, A)]},
        SYSTEM,
    ),
    "Tulu 3": ({"id": "t", "messages": chat(Q, A), "source": "ai2-adapt-dev/x"}, PLAIN),
    "LMSYS": (
        {"conversation_id": "c", "model": "m", "conversation": chat(Q, A), "turn": 1, "redacted": False},
        PLAIN,
    ),
    "WildChat": (
        {
            "conversation_hash": "h",
            "model": "m",
            "conversation": [
                t | {"language": "English", "toxic": False, "country": None} for t in chat(Q, A)
            ],
            "turn": 1,
        },
        PLAIN,
    ),
    "Alpaca": ({"instruction": Q, "input": "", "output": A, "text": "Below is ..."}, PLAIN),
    "Alpaca with a history": (
        {"instruction": DUSK[0], "input": "", "output": DUSK[1], "system": "", "history": [[Q, A]]},
        TWICE,
    ),
    "Alpaca with an input": (
        {"instruction": "Answer.", "input": Q, "output": A},
        [{"role": "user", "content": f"Answer.\n\n{Q}"}, PLAIN[1]],
    ),
    "Dolly": ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, PLAIN),
    "prompt and completion": ({"prompt": Q, "completion": A}, PLAIN),
    "prompt and completion as turns": ({"prompt": chat(Q), "completion": [PLAIN[1]]}, PLAIN),
    "question and answer": ({"question": Q, "answer": A}, PLAIN),
    "OpenOrca": ({"id": "cot.1", "system_prompt": "Be brief.", "question": Q, "response": A}, SYSTEM),
    "preference of texts": ({"prompt": Q, "chosen": A, "rejected": "No idea."}, PLAIN),
    "preference of chats": ({"prompt": Q, "chosen": chat(Q, A), "rejected": chat(Q, "No idea.")}, PLAIN),
    "preference of answers": ({"prompt": chat(Q), "chosen": [PLAIN[1]], "rejected": chat(Q)}, PLAIN),
    "Capybara": (
        {"source": "s", "conversation": [{"input": Q, "output": A}, {"input": DUSK[0], "output": DUSK[1]}]},
        TWICE,
    ),
    "pairs of human and assistant": (
        {"conversation_id": 1, "category": "c", "conversation": [{"human": Q, "assistant": A}]},
        PLAIN,
    ),
    "OpenThoughts": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": Q},
                {
                    "from": "assistant",
                    "value": f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n"
                    f"<|begin_of_solution|>\n\n{A}\n\n<|end_of_solution|>",
                },
            ],
        },
        [SYSTEM[0], *THINKS],
    ),
    "OpenThoughts, by columns": (
        {"problem": Q, "deepseek_reasoning": THOUGHT, "deepseek_solution": A, "domain": "physics"},
        THINKS,
    ),
    "OpenR1": ({"problem": Q, "solution": "S", "messages": chat(Q, THINK), "generations": ["g"]}, THINKS),
    "s1K": (
        {"question": Q, "solution": A, "thinking_trajectories": [THOUGHT], "cot_type": "science"},
        THINKS,
    ),
    "medical reasoning": ({"Question": Q, "Complex_CoT": THOUGHT, "Response": A}, THINKS),
    "Llama-Nemotron": (
        {
            "input": chat(Q),
            "output": THINK,
            "category": "science",
            "reasoning": "on",
            "system_prompt": "Be brief.",
        },
        [SYSTEM[0], *THINKS],
    ),
    "Llama-Nemotron, text": ({"input": Q, "output": A, "reasoning": "off", "used_in_training": "yes"}, PLAIN),
    "Nemotron Post-Training": (
        {
            "uuid": "u",
            "reasoning": "off",
            "messages": [
                {"role": "user", "content": Q, "tool_calls": []},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "clock", "arguments": '{"city": "Oslo"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "12:00", "tool_calls": []},
                {"role": "assistant", "content": A, "tool_calls": []},
            ],
            "metadata": json.dumps({"tools": TOOLS}),
        },
        CALLS,
    ),
    "Hermes function calling": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "gpt", "value": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
                {"from": "tool", "value": "12:00"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps(TOOLS),
        },
        [
            CALLS[0],
            {"role": "assistant", "content": f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"},
            *CALLS[2:],
        ],
    ),
    "Glaive, as ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps([BARE]),
        },
        CALLS,
    ),
    "xLAM": (
        {"id": 0, "query": Q, "tools": json.dumps([BARE]), "answers": json.dumps([CALL])},
        CALLS[:2],
    ),
    "ToolACE": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": Q},
                {"from": "assistant", "value": '[clock(city="Oslo")]'},
                {"from": "tool", "value": "12:00"},
                {"from": "assistant", "value": A},
            ],
        },
        [SYSTEM[0], CALLS[0], {"role": "assistant", "content": '[clock(city="Oslo")]'}, *CALLS[2:]],
    ),
    "OASST, as messages": (
        {"messages": [{"role": "prompter", "text": Q}, {"role": "assistant", "text": A}], "lang": "en"},
        PLAIN,
    ),
    "OpenAI, fine-tuning": (
        {
            "messages": [*chat(Q, "No idea."), {"role": "user", "content": DUSK[0]}, TWICE[3]],
            "parallel_tool_calls": False,
            "functions": [BARE],
        },
        [PLAIN[0], {"role": "assistant", "content": "No idea."}, *TWICE[2:]],
    ),
    "a string of JSON": ({"id": "1", "messages": json.dumps(chat(Q, A))}, PLAIN),
    "turns alone": (chat(Q, A), PLAIN),
    "an empty list first": ({"conversations": [], "messages": chat(Q, A)}, PLAIN),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_the_same_conversation(name):
    record, messages = SHAPES[name]
    cleaner = Cleaner()
    found = cleaner.clean(record, 0, "f.json")
    assert found is not None, dict(cleaner.counts)
    assert found.messages == messages
    if "tools" in str(record) or "functions" in str(record):
        assert found.tools == TOOLS or found.tools == [{"type": "function", "function": BARE}]


@pytest.mark.parametrize("name", [n for n, (record, _) in SHAPES.items() if isinstance(record, dict)])
def test_a_table_gives_what_json_gives(tmp_path, name):
    record, messages = SHAPES[name]
    table = pa.Table.from_pylist([record, {}])  # the columns of the one are null in the other
    pq.write_table(table, tmp_path / "t.parquet")
    first = next(iter(DataFile.open(str(tmp_path / "t.parquet")).records()))
    assert Cleaner().clean(first, 0, "t.parquet").messages == messages


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"text": "### Human: Why? ### Assistant: So."}, "an object with text"),
        ({"system": "SYSTEM: s", "chat": "USER: Why? ASSISTANT: So."}, "an object with system, chat"),
        (
            {"message_id": "m", "parent_id": None, "text": Q, "role": "prompter"},
            "an object with message_id, ",
        ),
        ({"prompt": 7}, "one with a turn that is an object with role, content"),
        ({"chosen": "Human: Why? Assistant: So.", "rejected": "r"}, "an object with chosen, rejected"),
        ({"messages": [{"role": "user", "txt": Q}]}, "one with a turn that is an object with role, txt"),
        ({"messages": {"role": "user", "content": Q}}, "an object with messages"),
        ({}, "an empty object"),
        (7, "a number"),
        (None, "null"),
    ],
)
def test_a_shape_that_is_not_read_is_named(record, shape):
    cleaner = Cleaner()
    assert cleaner.clean(record, 0, "f.json") is None
    assert cleaner.counts["dropped_malformed"] == 1
    assert cleaner.malformed.startswith(shape)


ODD = [
    *(
        None,
        True,
        0,
        -1.5,
        10**300,
        float("nan"),
        "",
        " ",
        "x",
        "[]",
        "[1]",
        "{}",
        "null",
        "\ud83d",
        "QzxaxzQ",
    ),
    *("<think>", "</think>", "<think>a</think>b", [], [1], [None], [[]], {}, {"a": 1}, {"role": "user"}),
    *({"name": "f"}, [{"type": "text", "text": 7}], [{"type": "thinking"}], ["a", "b"], [["a", "b"]]),
]
NAMES = ["role", "content", "value", "from", "tool_calls", "reasoning", "weight", "tools", "messages", "data"]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def spoilt(rng):
    """A record of one of the shapes with up to three of its values replaced, removed or added."""
    record = copy.deepcopy(SHAPES[rng.choice(list(SHAPES))][0])
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice([place for place in places(record) if place] or [(None,)])
        if last is None:
            return record
        inside = record
        for key in path:
            inside = inside[key]
        if rng.random() < 0.2:
            del inside[last]
        elif rng.random() < 0.2 and isinstance(inside, dict):
            inside[rng.choice(NAMES)] = copy.deepcopy(rng.choice(ODD))
        else:
            inside[last] = copy.deepcopy(rng.choice(ODD))
    return record


def test_records_of_any_kind_are_counted_and_none_is_a_crash(tmp_path):
    rng, cleaner = random.Random(0), Cleaner()
    chat_of_tools = Chat.load(str(write_model(tmp_path, PARALLEL)))
    kept = 0
    for number in range(1500):
        found = cleaner.clean(spoilt(rng), number, "f.json")
        if found is None:
            continue
        kept += 1
        if not chat_of_tools.holds_special(found.messages):
            assert chat_of_tools.render(found.messages, found.tools).text
    lost = sum(n for name, n in cleaner.counts.items() if name.startswith("dropped_"))
    assert kept + lost == cleaner.counts["read"] == 1500
    assert kept > 100


def test_what_json_has_no_kind_for_becomes_text(tmp_path):
    day = datetime.date(2024, 7, 26)
    record = {
        "messages": [
            PLAIN[0],
            {"role": "assistant", "content": "", "function_call": CALL | {"arguments": {"day": day}}},
        ]
    }
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "t.parquet")
    (read,) = DataFile.open(str(tmp_path / "t.parquet")).records()
    assert Cleaner().clean(read, 0, "t").messages[1]["calls"][0]["arguments"] == {"day": "2024-07-26"}
