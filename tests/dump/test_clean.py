"""Each cleaning rule, alone and on the chat file that has them all."""

import json
from pathlib import Path

import pytest

from dump.clean import COUNTS, Cleaner

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"


def clean(*turns, **record):
    cleaner = Cleaner()
    found = cleaner.clean(
        {"conversations": [{"from": r, "value": t} for r, t in turns]} | record, 0, "f.json"
    )
    messages = None if found is None else [(m["role"], m["content"]) for m in found.messages]
    return messages, {name: n for name, n in cleaner.counts.items() if n and name != "read"}


Q, A = ("human", "why?"), ("gpt", "because")
USER, ASSISTANT = ("user", "why?"), ("assistant", "because")
NOTICE = "*This conversation is shared from [**X**](https://x.example)*"


@pytest.mark.parametrize(
    ("turns", "messages", "counts"),
    [
        ([Q, A], [USER, ASSISTANT], {}),
        ([("user", "why?"), ("Assistant", "because")], [USER, ASSISTANT], {"turns_renamed": 1}),
        ([Q, ("bing", "because")], [USER, ASSISTANT], {"turns_renamed": 1}),
        ([("system", "Be kind."), Q, A], [("system", "Be kind."), USER, ASSISTANT], {}),
        ([("system", NOTICE), Q, A], [USER, ASSISTANT], {"turns_sharing_notice": 1}),
        ([Q, ("system", "changed"), A], [USER, ASSISTANT], {"turns_late_system": 1}),
        ([A, A, Q, A], [USER, ASSISTANT], {"turns_leading_assistant": 2}),
        (
            [("system", "Be kind."), A, Q, A],
            [("system", "Be kind."), USER, ASSISTANT],
            {"turns_leading_assistant": 1},
        ),
        (
            [Q, Q, A, A],
            [("user", "why?\n\nwhy?"), ("assistant", "because\n\nbecause")],
            {"turns_joined": 2},
        ),
        (
            [Q, A, ("human", " \n"), A],
            [USER, ("assistant", "because\n\nbecause")],
            {"turns_empty": 1, "turns_joined": 1},
        ),
        ([Q, A, Q], [USER, ASSISTANT], {"turns_unanswered": 1}),
        ([Q, ("gpt", " spaced \n")], [USER, ("assistant", " spaced \n")], {}),
        ([Q, ("gpt", "half \ud83d")], [USER, ("assistant", "half \ufffd")], {"turns_repaired": 1}),
        ([], None, {"dropped_empty": 1}),
        ([("human", ""), ("gpt", " ")], None, {"turns_empty": 2, "dropped_empty": 1}),
        ([Q], None, {"turns_unanswered": 1, "dropped_no_assistant": 1}),
        ([A], None, {"turns_leading_assistant": 1, "dropped_no_assistant": 1}),
        ([Q, ("tool", "{}"), A], None, {"dropped_unknown_role": 1}),
        ([Q, ("gpt", None)], None, {"dropped_malformed": 1}),
        ([Q, ("gpt", 7)], None, {"dropped_malformed": 1}),
    ],
)
def test_rules(turns, messages, counts):
    assert clean(*turns) == (messages, counts)


@pytest.mark.parametrize(
    "record", [None, 3, "text", [], {}, {"conversations": "text"}, {"conversations": [3]}]
)
def test_records_of_other_shapes_are_counted(record):
    cleaner = Cleaner()
    assert cleaner.clean(record, 0, "f.json") is None
    assert cleaner.counts["dropped_malformed"] == 1


def test_an_id_that_is_no_text_is_repaired():
    record = {"id": "a\ud800_3", "conversations": [{"from": r, "value": t} for r, t in (Q, A)]}
    found = Cleaner().clean(record, 0, "f.json")
    assert (found.id, found.base) == ("a\ufffd_3", "a\ufffd")


def test_a_key_without_a_value_is_not_there():
    """Parquet gives every turn every key of the column's struct."""
    roles, texts = ("user", "assistant"), ("why?", "because")
    turns = [
        {"from": None, "value": None, "role": r, "content": t} for r, t in zip(roles, texts, strict=True)
    ]
    found = Cleaner().clean({"messages": turns}, 0, "f.parquet")
    assert [(m["role"], m["content"]) for m in found.messages] == [USER, ASSISTANT]


def test_a_duplicate_is_what_is_equal_after_cleaning():
    cleaner = Cleaner()
    first = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}]}
    second = {"conversations": [{"from": r, "value": t} for r, t in (A, Q, A, Q)]}
    assert cleaner.clean(first, 0, "f.json") is not None
    assert cleaner.clean(second, 1, "f.json") is None
    assert cleaner.counts["dropped_duplicate"] == 1


def test_reasoning_beside_the_content_is_kept():
    cleaner = Cleaner()
    answer = {"role": "assistant", "content": "42", "reasoning_content": "6 * 7\n"}
    found = cleaner.clean({"messages": [{"role": "user", "content": "?"}, answer]}, 0, "f.json")
    assert found.messages[1]["content"] == "<think>\n6 * 7\n</think>\n\n42"
    assert cleaner.counts["turns_reasoning"] == 1


@pytest.mark.parametrize(
    ("given", "found", "base"),
    [
        ("Ab3dE6g_12", "Ab3dE6g_12", "Ab3dE6g"),
        ("plain", "plain", "plain"),
        (17, "17", "17"),
        (None, "f.json#5", "f.json#5"),
        ("", "f.json#5", "f.json#5"),
    ],
)
def test_ids_and_their_bases(given, found, base):
    record = {
        "id": given,
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    }
    conversation = Cleaner().clean(record, 5, "f.json")
    assert (conversation.id, conversation.base) == (found, base)


def test_the_chat_file_meets_every_rule():
    cleaner = Cleaner()
    kept = [cleaner.clean(json.loads(line), i, "c") for i, line in enumerate(CHATS.read_text().splitlines())]
    assert [name for name in COUNTS if not cleaner.counts[name]] == []
    lost = sum(n for name, n in cleaner.counts.items() if name.startswith("dropped_"))
    assert cleaner.counts["read"] == lost + sum(c is not None for c in kept)
    for conversation in filter(None, kept):
        roles = [m["role"] for m in conversation.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
