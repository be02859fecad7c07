"""Each cleaning rule, alone and on the chat file that has them all."""

import json
from pathlib import Path

import pytest

from dump.clean import COUNTS, Cleaner
from dump.record_shapes import unwrapped

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
        ([Q, ("narrator", "{}"), A], None, {"dropped_unknown_role": 1}),
        ([Q, A, Q, ("gpt", None)], [USER, ASSISTANT], {"turns_empty": 1, "turns_unanswered": 1}),
        ([Q, ("gpt", 7)], None, {"dropped_malformed": 1}),
        ([Q, ("gpt", [{"type": "image"}])], None, {"dropped_not_text": 1}),
        ([Q, ("tool", "4 degrees"), A], [USER, ("tool", "4 degrees"), ASSISTANT], {}),
        ([Q, ("observation", "4"), A], [USER, ("tool", "4"), ASSISTANT], {"turns_renamed": 1}),
    ],
)
def test_rules(turns, messages, counts):
    assert clean(*turns) == (messages, counts)


@pytest.mark.parametrize("record", [None, 3, "text", {}, {"conversations": "text"}, {"conversations": [3]}])
def test_records_of_other_shapes_are_counted(record):
    cleaner = Cleaner()
    assert cleaner.clean(record, 0, "f.json") is None
    assert cleaner.counts["dropped_malformed"] == 1


def test_an_id_that_is_no_text_is_repaired():
    record = {"id": "a\ud800_3", "conversations": [{"from": r, "value": t} for r, t in (Q, A)]}
    assert Cleaner().clean(record, 0, "f.json").id == "a\ufffd_3"


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


REASONED = [
    {"content": "42", "reasoning_content": "6 * 7\n"},
    {"content": "42", "reasoning": "6 * 7"},
    {"content": "42", "thinking": "6 * 7"},
    {"content": "42", "thought": "6 * 7", "reasoning_content": None},
    {"content": "42", "reasoning_details": [{"type": "reasoning.text", "text": "6 * 7"}]},
    {"content": "42", "reasoning": "6 * 7", "reasoning_details": [{"text": "6 * 7"}]},
    {"content": [{"type": "thinking", "thinking": "6 * 7"}, {"type": "text", "text": "42"}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "6 * 7"}]}, "42"]},
    {"content": "<think>\n6 * 7\n</think>\n\n42"},
    {"content": "<think>6 * 7</think>42"},
    {"content": "6 * 7\n</think>\n\n42"},
    {"content": "<thinking>6 * 7</thinking>\n42"},
    {"content": "[THINK]6 * 7[/THINK]42"},
    {"content": "<|begin_of_thought|>6 * 7<|end_of_thought|>\n<|begin_of_solution|>42<|end_of_solution|>"},
    {"content": "<think>6 * 7</think> <answer>42</answer>"},
]


@pytest.mark.parametrize("answer", REASONED)
def test_reasoning_is_the_same_whatever_it_is_called(answer):
    cleaner = Cleaner()
    talk = [{"role": "user", "content": "?"}, {"role": "assistant"} | answer]
    found = cleaner.clean({"messages": talk}, 0, "f.json")
    assert found.messages[1] == {"role": "assistant", "content": "42", "reasoning": "6 * 7"}
    assert cleaner.counts["turns_reasoning"] == 1


@pytest.mark.parametrize(
    "text", ["Write </think> behind it.", "<think> never closed", "Tags: <think>a</think>"]
)
def test_text_that_only_mentions_tags_is_left_as_it_is(text):
    messages, counts = clean(Q, ("gpt", text))
    assert messages[1] == ("assistant", text)
    assert not counts


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"loss": 0.0}, {"masked": True}],
)
def test_an_answer_that_is_left_out_of_training_says_so(flag):
    cleaner = Cleaner()
    talk = [{"from": "human", "value": "?", "weight": 0}, {"from": "gpt", "value": "42"} | flag]
    found = cleaner.clean({"conversations": talk}, 0, "f.json")
    assert found.messages == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "42", "counted": False},
    ]
    assert cleaner.counts["turns_masked"] == 1


ARGUMENTS = '{"city": "Oslo"}'
CALL = {"name": "clock", "arguments": {"city": "Oslo"}}


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": CALL}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": CALL | {"arguments": ARGUMENTS}}]}],
        [{"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}],
        [{"role": "assistant", "content": None, "function_call": CALL}],
        [{"from": "function_call", "value": json.dumps(CALL)}],
        [{"from": "gpt", "value": " "}, {"from": "function_call", "value": json.dumps([CALL])}],
    ],
)  # fmt: skip
def test_calls_of_tools_are_the_same_whatever_they_are_called(turns):
    talk = [{"role": "user", "content": "?"}, *turns, {"from": "observation", "value": "12:00"}, Z]
    found = Cleaner().clean({"messages": talk, "tools": '[{"name": "clock"}]'}, 0, "f.json")
    assert found.messages == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": found.messages[1]["content"], "calls": [CALL]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    assert not found.messages[1]["content"].strip()
    assert found.tools == [{"type": "function", "function": {"name": "clock"}}]


Z = {"role": "assistant", "content": "Noon."}
BAD = '{"name": "f", "arguments": "{no JSON"}'


def test_what_is_no_json_in_a_definition_becomes_text():
    tool = json.loads('{"name": "f", "parameters": {"least": NaN, "most": Infinity}}')
    record = {"messages": [{"role": "user", "content": "?"}, Z], "tools": [tool]}
    (found,) = Cleaner().clean(record, 0, "f.json").tools
    assert found["function"]["parameters"] == {"least": "NaN", "most": "Infinity"}


@pytest.mark.parametrize(
    "call", ["no JSON", '{"arguments": {}}', '{"name": "f", "arguments": [1]}', "7", BAD]
)
def test_calls_that_cannot_be_read_are_malformed(call):
    _, counts = clean(Q, ("function_call", call), A)
    assert counts == {"dropped_malformed": 1}


@pytest.mark.parametrize(
    ("given", "found", "base"),
    [
        ("Ab3dE6g_12", "Ab3dE6g_12", "Ab3dE6g"),
        ("plain", "plain", "plain"),
        ("local_000017", "local_000017", "local_000017"),
        ("corpora1_007", "corpora1_007", "corpora1_007"),
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
        turns = [role for role in roles[roles[0] == "system" :] if role != "tool"]
        assert turns == ["user", "assistant"] * (len(turns) // 2)


ASKED = {"role": "user", "content": "why?"}


def answered(text, reason, **more):
    return {"role": "assistant", "content": text, "finish_reason": reason, **more}


def test_an_answer_that_was_cut_off_or_held_back_is_known_by_its_finish_reason():
    cleaner = Cleaner()
    turns = [
        *(ASKED, answered("whole", "stop"), ASKED, answered("half", "length")),
        *(ASKED, answered("no", "content_filter"), ASKED),
        answered("", "length", reasoning_content="hm"),
        *(ASKED, answered("<think>\nhm, half a", "length")),
    ]
    messages = cleaner.clean({"messages": turns}, 0, "f.json").messages[1::2]
    assert [m.get("cut", False) for m in messages] == [False, True, False, True, True]
    assert [m.get("counted", True) for m in messages] == [True, True, False, False, False]
    assert messages[-1]["reasoning"] == "hm, half a"
    assert (cleaner.counts["turns_cut_off"], cleaner.counts["turns_masked"]) == (3, 3)


def test_a_turn_that_goes_on_behind_one_that_was_cut_off_is_whole():
    turns = [ASKED, answered("half", "length"), answered("and the rest", "stop")]
    (_, message) = Cleaner().clean({"messages": turns}, 0, "f.json").messages
    assert "cut" not in message


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "why?"}, [ASKED]),
        ({"prompt": "why?", "tools": [{"name": "clock"}], "id": 3}, [ASKED]),
        ({"prompt": [ASKED]}, [ASKED]),
        ({"question": "why?", "answer": "so"}, [ASKED]),
        (
            {"messages": [{"role": "system", "content": "s"}, ASKED, answered("a", "stop"), ASKED]},
            [{"role": "system", "content": "s"}, ASKED, ASKED],
        ),
        ({"messages": [answered("a", "stop"), ASKED]}, [ASKED]),
    ],
)
def test_questions_alone_are_the_system_turn_and_the_users(record, messages):
    (value,) = unwrapped(record)
    assert Cleaner(questions=True).clean(value, 0, "f.json").messages == messages


def test_questions_that_are_equal_are_duplicates_whatever_was_answered():
    cleaner = Cleaner(questions=True)
    records = [{"messages": [ASKED, answered(text, "stop")]} for text in ("one", "two")]
    assert [cleaner.clean(r, i, "f.json") is None for i, r in enumerate(records)] == [False, True]


@pytest.mark.parametrize(
    ("record", "count"),
    [
        ({"messages": [{"role": "system", "content": "s"}]}, "dropped_no_question"),
        ({"messages": [ASKED, answered("", "tool_calls", tool_calls=[{"name": "f"}])]}, "dropped_tools"),
        ({"messages": [ASKED, {"role": "tool", "content": "4"}]}, "dropped_tools"),
    ],
)
def test_what_cannot_be_asked_is_counted(record, count):
    cleaner = Cleaner(questions=True)
    assert cleaner.clean(record, 0, "f.json") is None
    assert cleaner.counts[count] == 1
