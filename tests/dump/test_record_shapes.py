"""Each published layout of a record becomes the same conversation; what is none is named."""

import copy
import datetime
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dump.chat import Chat
from dump.clean import Cleaner
from dump.conversations import DataFile
from tests.dump.chats import write_model
from tests.dump.published_records import BARE, CALL, PLAIN, SHAPES, TOOLS, Q
from tests.dump.test_dialect import PARALLEL


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
