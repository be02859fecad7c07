"""Whatever a server replies is an answer that prepare can read, or none; never a crash."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump.clean import Cleaner
from pipelines.regenerate.reply import RubbishError, read_problem, read_reply, read_stream
from pipelines.regenerate.talk import Talk

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v), max_leaves=6
)
TEXTS = (
    st.sampled_from(["", " ", "so", "<think>hm</think>", "<think>a\n</think>\n\nb", "\U0001f309"]) | VALUES
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "function": st.fixed_dictionaries({}, optional={"name": TEXTS, "arguments": TEXTS}),
        "id": VALUES,
    },
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": TEXTS,
        "content": TEXTS | st.lists(st.fixed_dictionaries({"type": TEXTS, "text": TEXTS}), max_size=2),
        "reasoning_content": TEXTS,
        "reasoning": TEXTS,
        "refusal": TEXTS,
        "tool_calls": st.lists(CALLS, max_size=2) | VALUES,
        "function_call": CALLS | VALUES,
    },
)
REASONS = st.sampled_from(["stop", "length", "tool_calls", "content_filter", "abort"]) | VALUES
REPLIES = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"message": MESSAGES, "finish_reason": REASONS}), min_size=1)},
    optional={"usage": st.fixed_dictionaries({"completion_tokens": VALUES}) | VALUES},
)
QUESTION = {"role": "user", "content": "why?"}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(REPLIES | VALUES)
def test_any_json_is_an_answer_that_can_be_read_or_rubbish(value):
    check(value)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(REPLIES)
def test_a_thousand_replies(value):
    check(value)


EVENTS = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"delta": MESSAGES, "finish_reason": REASONS}), max_size=1)},
    optional={"usage": VALUES},
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(EVENTS | VALUES, max_size=4))
def test_any_events_are_an_answer_or_rubbish(values):
    body = b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values)
    with suppress(RubbishError):
        assert isinstance(read_stream(body).message["content"], str)


def check(value):
    body = json.dumps(value).encode()
    read_problem(body)
    try:
        answer = read_reply(body)
    except RubbishError:
        return
    talk = Talk(0, "a", [], [], b"", [QUESTION, answer.message], answer.tokens)
    line = json.loads(json.dumps(talk.record(answer.kind), allow_nan=False))
    cleaner = Cleaner()
    found = cleaner.clean(line, 0, "f.jsonl")
    assert cleaner.counts["dropped_malformed"] == 0
    if answer.kind in ("whole", "called"):
        assert found is not None
        assert ("calls" in found.messages[1]) == (answer.kind == "called")
    assert isinstance(answer.message["content"], str), "it is sent to the server again"


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_bytes_are_rubbish(body):
    read_problem(body)
    with pytest.raises(RubbishError):
        read_reply(body)
