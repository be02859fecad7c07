"""Answers are located in what templates of many habits render, or not at all; never in the wrong place."""

import jinja2
import pytest

from dump.answer_spans import find_answers

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# What follows has, one each, the habits of published templates.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
# Qwen3: thoughts leave earlier turns, and the last turn always has a block for them, be it empty.
LAST_THINKS = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}"
    "{% if loop.last %}<think>\n{{ m.reasoning }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}[/]\n{% endfor %}"
)
SHOUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content.replace('o', '0') }}[/]{% endfor %}"
# gpt-oss: the answer begins before its content, and a tool's result repeats the name of the call.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.reasoning %}<start>assistant<channel>analysis<message>{{ m.reasoning }}<end>{% endif %}"
    "{% if m.calls %}<start>assistant to={{ m.calls[0].name }}<message>{{ m.calls[0].arguments }}<call>"
    "{% else %}<start>assistant<channel>final<message>{{ m.content }}<end>{% endif %}"
    "{% elif m.role == 'tool' %}"
    "<start>{{ messages[loop.index0 - 1].calls[0].name }}<message>{{ m.content }}<end>"
    "{% else %}<start>{{ m.role }}<message>{{ m.content }}<end>{% endif %}{% endfor %}"
)
LISTENS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content.endswith('?') %}Question: {% endif %}"
    "{{ m.content }}[/]{% endfor %}"
)
COUNTS = "{% for m in messages %}[{{ m.role }} {{ m.content | length }}]{{ m.content }}[/]{% endfor %}"
FORGETS = "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"


def talk(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def found(template, messages, prompt=""):
    compiled = jinja2.Template(template, keep_trailing_newline=True)

    def render(given):
        return compiled.render(messages=given)

    text = render(messages)
    answers = find_answers(messages, text, render, prompt)
    return None if answers is None else [text[answer.start : answer.end] for answer in answers]


PLAIN = talk("one?", "one.", "and two?", "two.\nReally two.")
# Each answer also stands elsewhere, so that looking for its text would find the wrong place.
REPEATED = talk("yes", "yes", "yes no", "yes", "assistant", "no", system="yes")
SPACED = talk("q", "  spaced out \n", "q", "\n\nlate")
THOUGHTS = talk("q1", "answer one", "q2", "answer two")
THOUGHTS[1]["reasoning"], THOUGHTS[3]["reasoning"] = "first", "second"
HEADER = "[assistant]\n"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, PLAIN, ["one.", "two.\nReally two."]),
        (CHATML, REPEATED, ["yes", "yes", "no"]),
        (CHATML, SPACED, ["  spaced out \n", "\n\nlate"]),
        (DEFAULT_SYSTEM, PLAIN, ["one.", "two.\nReally two."]),
        (DEFAULT_SYSTEM, REPEATED, ["yes", "yes", "no"]),
        (TRIMS, SPACED, ["spaced out", "late"]),
        (TRIMS, REPEATED, ["yes", "yes", "no"]),
        (LISTENS, PLAIN, ["one.", "two.\nReally two."]),
        (CHATML, talk("QzxaxzQ", "an answer", "Qzxb", "QzxaxzQ"), ["an answer", "QzxaxzQ"]),
        (SHOUTS, talk("who?", "nobody, or so", "go on", "no"), ["n0b0dy, 0r s0", "n0"]),
    ],
)
def test_spans_are_the_answers(template, messages, expected):
    assert found(template, messages) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (HEADER, ["answer one", "<think>\nsecond\n</think>\n\nanswer two"]),
        (HEADER + "<think>\n", ["answer one", "second\n</think>\n\nanswer two"]),
    ],
)
def test_reasoning_is_written_by_the_model_and_its_opening_tag_where_the_prompt_has_none(prompt, expected):
    assert found(LAST_THINKS, THOUGHTS, prompt) == expected


def test_empty_tags_of_the_template_are_not_written_by_the_model():
    messages = talk("q", "plain")
    assert (
        found(LAST_THINKS, messages, HEADER)
        == found(LAST_THINKS, messages, HEADER + "<think>\n")
        == ["plain"]
    )


def test_everything_behind_the_prompt_is_written_by_the_model():
    call = {"role": "assistant", "content": "", "calls": [{"name": "clock", "arguments": "{}"}]}
    result, answer = (
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon.", "reasoning": "12"},
    )
    talk = [{"role": "user", "content": "<start>assistant?"}, call, result, answer]
    assert found(CHANNELS, talk, "<start>assistant") == [
        " to=clock",
        "<channel>analysis<message>12<end><start>assistant<channel>final<message>Noon.",
    ]


def test_a_call_that_the_template_leaves_out_is_noticed():
    calls = [{"name": name, "arguments": "{}"} for name in ("clock", "calendar")]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "calls": calls}]
    assert found(CHANNELS, messages, "<start>assistant") is None


@pytest.mark.parametrize("template", [COUNTS, FORGETS])
def test_a_template_that_cannot_be_followed_gives_no_spans(template):
    assert found(template, talk("first question", "the first answer", "q", "a longer answer")) is None


def test_text_that_can_be_divided_in_two_ways_is_not_trusted():
    # The template changes "o", so that only the pieces are known, and an answer spells one of them.
    assert found(SHOUTS, talk("who?", "no[/][user]go on[/][assistant]no", "go on", "no")) is None


@pytest.mark.parametrize("template", [CHATML, SHOUTS, LISTENS])
def test_the_number_of_renders_does_not_grow_with_the_turns(template):
    renders = []

    def render(given):
        renders.append(len(given))
        return jinja2.Template(template).render(messages=given)

    messages = talk(*(f"go on {i}?" for i in range(500)))
    assert len(find_answers(messages, render(messages), render)) == 250
    assert len(renders) <= 3
