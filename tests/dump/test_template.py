"""Templates render as transformers renders them, and no template runs away."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from common.errors import EyasError
from dump import template as module
from dump.template import Template, TemplateRanAwayError, TemplateRefusedError

MESSAGES = [{"role": "user", "content": "<q> \u00e9 \U0001f309"}, {"role": "assistant", "content": " a\n"}]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"<b>": "\u00e9"}}}]


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}\n  {% if m.role %}\n[{{ m.content }}]\n  {% endif %}\n{% endfor %}\n",
        "{{- tools | tojson }}\n{{ tools | tojson(indent=2) }}{{ messages | tojson }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m['role'] | trim }}{% endfor %}",
        "{{ bos_token }}{{ nothing_such }}{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}",
        "{% for m in messages[::-1] %}{{ m.content.split('q')[-1].strip() }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    ],
)
def test_the_text_and_the_marks_are_those_of_transformers(text):
    variables = {"bos_token": "<s>", "tools": TOOLS}
    texts, spans = render_jinja_template(
        conversations=[MESSAGES], chat_template=text, return_assistant_tokens_mask=True, **variables
    )
    assert Template(text).render(messages=MESSAGES, documents=None, **variables) == (texts[0], spans[0])


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    monkeypatch.setattr(module, "_MEMORY", 256 << 20)


LOOPS = "{% set ns = namespace(x=MADE) %}{% for i in range(99) %}{% set ns.x = GROWN %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself for ever"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
        ("{{ 'a' | slice(10**10) | list }}", "not done after|too much memory"),
        ("{{ 'x' * 10**11 }}", "too much memory"),
        ("{{ '%100000000000d' % 1 }}", "too much memory"),
        ("{{ 'x'.ljust(10**12) }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", "more than 64 MiB"),
        ("{{ 10**(10**8) }}", "an integer that is too large"),
        (LOOPS.replace("MADE", "3").replace("GROWN", "ns.x * ns.x"), "an integer that is too large"),
        (LOOPS.replace("MADE", "'x'").replace("GROWN", "ns.x ~ ns.x"), "too much memory"),
        (LOOPS.replace("MADE", "[1]").replace("GROWN", "ns.x + ns.x"), "too much memory"),
    ],
)
def test_a_template_that_runs_away_is_ended(impatient, text, message):
    with pytest.raises(TemplateRanAwayError, match=message):
        Template(text).render(messages=MESSAGES)
    assert Template("{{ messages[1].content }}").render(messages=MESSAGES)[0] == " a\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% include 'secret.txt' %}", "inside the template"),
        ("{{ raise_exception('Not like this') }}", "^Not like this$"),
    ],
)
def test_a_template_that_reaches_out_or_raises_refuses(text, message):
    with pytest.raises(TemplateRefusedError, match=message):
        Template(text).render(messages=MESSAGES)


@pytest.mark.parametrize(
    "text", ["{% for m in", "{{ ", "{% nonsense %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"]
)
def test_what_is_no_template_is_one_line(text):
    with pytest.raises(EyasError, match="of some/model is no Jinja template") as error:
        Template(text, "some/model")
    assert "\n" not in str(error.value)
