"""Answers are located in what templates of many habits render, or not at all; never in the wrong place."""

import jinja2
import pytest

from dump.answer_spans import answer_spans

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# What follows has, one each, the habits of published templates.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)
TRIMS = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/]{% endfor %}"
DROPS_THOUGHTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}[/]{% endfor %}"
)
# Qwen3: thoughts leave earlier turns, and the last turn always has a block for them, be it empty.
LAST_THINKS = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' %}"
    "{% set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set r = m.content.rpartition('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% else %}{{ m.content }}{% endif %}[/]\n{% endfor %}"
)
SHOUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content.replace('o', '0') }}[/]{% endfor %}"
COUNTS = "{% for m in messages %}[{{ m.role }} {{ m.content | length }}]{{ m.content }}[/]{% endfor %}"
FORGETS = "{% for m in messages[-2:] %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"


def talk(*contents, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def found(template, messages, opened=False):
    def render(given):
        return jinja2.Template(template, keep_trailing_newline=True).render(messages=given)

    text = render(messages)
    spans = answer_spans(messages, text, render, opened)
    return None if spans is None else [text[start:end] for start, end in spans]


PLAIN = talk("one?", "one.", "and two?", "two.\nReally two.")
# Each answer also stands elsewhere, so that looking for its text would find the wrong place.
REPEATED = talk("yes", "yes", "yes no", "yes", "assistant", "no", system="yes")
SPACED = talk("q", "  spaced out \n", "q", "\n\nlate")
THOUGHTS = talk(
    "q1", "<think>\nfirst\n</think>\n\nanswer one", "q2", "<think>\nsecond\n</think>\n\nanswer two"
)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, PLAIN, ["one.", "two.\nReally two."]),
        (CHATML, REPEATED, ["yes", "yes", "no"]),
        (CHATML, SPACED, ["  spaced out \n", "\n\nlate"]),
        (CHATML, THOUGHTS, [THOUGHTS[1]["content"], THOUGHTS[3]["content"]]),
        (DEFAULT_SYSTEM, PLAIN, ["one.", "two.\nReally two."]),
        (DEFAULT_SYSTEM, REPEATED, ["yes", "yes", "no"]),
        (TRIMS, SPACED, ["spaced out", "late"]),
        (TRIMS, REPEATED, ["yes", "yes", "no"]),
        (DROPS_THOUGHTS, THOUGHTS, ["\n\nanswer one", "\n\nanswer two"]),
        (LAST_THINKS, THOUGHTS, ["answer one", "<think>\nsecond\n</think>\n\nanswer two"]),
        (LAST_THINKS, PLAIN, ["one.", "two.\nReally two."]),
        (LAST_THINKS, talk("q", "<think>\n\n</think>\n\nplain"), ["plain"]),
        (SHOUTS, talk("who?", "nobody, or so", "go on", "no"), ["n0b0dy, 0r s0", "n0"]),
    ],
)
def test_spans_are_the_answers(template, messages, expected):
    assert found(template, messages) == expected


def test_an_opening_tag_in_the_generation_prompt_is_no_answer():
    assert found(LAST_THINKS, THOUGHTS, opened=True) == ["answer one", "second\n</think>\n\nanswer two"]


@pytest.mark.parametrize("template", [COUNTS, FORGETS])
def test_a_template_that_cannot_be_followed_gives_no_spans(template):
    assert found(template, talk("first question", "the first answer", "q", "a longer answer")) is None


def test_text_that_spells_a_stand_in_is_not_trusted():
    assert found(CHATML, talk("QzxaxzQ", "an answer")) is None
