"""How each template wants its messages is found by trying; the habits are those of published templates."""

import pytest

from dump.chat import Chat, TemplateNotFollowedError
from tests.dump.chats import CHATML, counted_texts, write_model

END = "<|im_end|>"
HEADER = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(answer, others="{{ m.content }}", before="", prompt=PROMPT):
    """ChatML with an own way of writing answers."""
    body = "{% if m.role == 'assistant' %}" + answer + "{% else %}" + others + "{% endif %}"
    return before + "{% for m in messages %}" + HEADER + body + END + "\n{% endfor %}" + prompt


FIELD = chatml("{% if m.FIELD %}<think>\n{{ m.FIELD }}\n</think>\n\n{% endif %}{{ m.content }}")
LAST_ONLY = chatml(
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
)
REMOVES = chatml("{{ m.content.split('</think>')[-1] }}")
PROMPTED = chatml(
    "{{ m.content.split('</think>')[-1] }}",
    prompt="{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
)
CHANNELS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>"
    "{% else %}{% if m.thinking and loop.last %}<|im_start|>assistant/analysis:{{ m.thinking }}<|im_end|>"
    "{% endif %}"
    "<|im_start|>assistant/final:{{ m.content }}{% if loop.last %}<|endoftext|>{% else %}<|im_end|>"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>\n"
    "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>\n{% endif %}"
)


def thinking_talk():
    return [
        {"role": "user", "content": "How many legs has a spider?"},
        {"role": "assistant", "content": "Eight.", "reasoning": "Spiders are arachnids."},
        {"role": "user", "content": "And an ant?"},
        {"role": "assistant", "content": "Six.", "reasoning": "Ants are insects."},
    ]


ONE, TWO = (
    "<think>\nSpiders are arachnids.\n</think>\n\nEight.",
    "<think>\nAnts are insects.\n</think>\n\nSix.",
)


@pytest.mark.parametrize(
    ("template", "expected", "removed"),
    [
        (CHATML, [ONE + END, TWO + END], 0),
        *[
            (FIELD.replace("FIELD", name), [ONE + END, TWO + END], 0)
            for name in ("reasoning_content", "thinking")
        ],
        (LAST_ONLY, ["Eight." + END, TWO + END], 1),
        (REMOVES, ["Eight." + END, "Six." + END], 2),
        (PROMPTED, ["Eight." + END, TWO.removeprefix("<think>\n") + END], 1),
        (
            CHANNELS,
            [
                "/final:Eight." + END,
                "/analysis:Ants are insects.<|im_end|><|im_start|>assistant/final:Six.<|endoftext|>",
            ],
            1,
        ),
    ],
)
def test_reasoning_is_counted_where_the_template_leaves_it(tmp_path, template, expected, removed):
    chat = Chat.load(str(write_model(tmp_path, template)))
    assert counted_texts(chat, thinking_talk()) == expected
    assert chat.render(thinking_talk()).removed == removed


MARKS = chatml("{% generation %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}")


def test_reasoning_that_a_template_of_marks_removes_is_noticed(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, MARKS)))
    assert chat.render(thinking_talk()).removed == 2
    assert counted_texts(chat, thinking_talk()) == ["Eight." + END, "Six." + END]


@pytest.mark.parametrize(
    "template", [CHATML, MARKS.replace("{% endgeneration %}", END + "{% endgeneration %}")]
)
def test_a_masked_answer_is_not_counted(tmp_path, template):
    chat = Chat.load(str(write_model(tmp_path, template)))
    talk = thinking_talk()
    talk[1]["counted"] = False
    (found,) = counted_texts(chat, talk)
    assert found.endswith("Six." + END)


@pytest.mark.parametrize(
    "refusal", ["{{ raise_exception('no system') }}", "{% set messages = messages[1:] %}"]
)
def test_a_system_turn_stands_before_the_question_where_the_template_has_none(tmp_path, refusal):
    before = "{% if messages[0].role == 'system' %}" + refusal + "{% endif %}"
    chat = Chat.load(str(write_model(tmp_path, before + CHATML)))
    assert not chat.has_system
    rendered = chat.render([{"role": "system", "content": "Be brief."}, *thinking_talk()])
    assert rendered.text.startswith("<|im_start|>user\nBe brief.\n\nHow many legs has a spider?<|im_end|>")
    assert Chat.load(str(write_model(tmp_path, CHATML))).has_system


def test_a_stop_token_that_only_the_next_turn_would_write_is_added_behind_the_last_answer(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, NO_STOP)))
    talk = [{k: v for k, v in m.items() if k != "reasoning"} for m in thinking_talk()]
    assert counted_texts(chat, talk) == ["Eight.<|im_start|>", "Six.<|im_start|>"]


DEFINED = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGS</call>{% endfor %}"
PARALLEL = chatml(CALLS.replace("ARGS", "{{ c.function.arguments | tojson }}"), before=DEFINED)
TEXTUAL = chatml(CALLS.replace("ARGS", "{{ '' + c.function.arguments }}"), before=DEFINED)
NONE_ONLY = chatml(
    "{% if m.content is none %}"
    + CALLS.replace("{{ m.content }}", "").replace("ARGS", "{{ '' + c.function.arguments }}")
    + "{% else %}{{ m.content }}{% endif %}",
    before=DEFINED,
)  # fmt: skip
FIRST_ONLY = PARALLEL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]


def tool_talk(*names, content=""):
    calls = [{"name": name, "arguments": {"city": "Oslo"}} for name in names]
    return [
        {"role": "user", "content": "Time in Oslo?"},
        {"role": "assistant", "content": content, "calls": calls},
        *({"role": "tool", "content": "12:00", "name": name} for name in names),
        {"role": "assistant", "content": "Noon."},
    ]


@pytest.mark.parametrize("template", [PARALLEL, TEXTUAL, NONE_ONLY])
@pytest.mark.parametrize("names", [("clock",), ("clock", "clock"), ("clock", "calendar")])
def test_calls_are_counted_and_results_are_not(tmp_path, template, names):
    chat = Chat.load(str(write_model(tmp_path, template)))
    assert chat.has_tools
    calls = "".join("<call>" + name + ' {"city": "Oslo"}</call>' for name in names)
    encoded = counted_texts(chat, tool_talk(*names))
    assert encoded == [calls + END, "Noon." + END]
    assert '"name": "clock"' in chat.render(tool_talk(*names), TOOLS).text.partition("<|im_start|>")[0]


def test_text_beside_calls_is_counted_with_them(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, PARALLEL)))
    first, _ = counted_texts(chat, tool_talk("clock", content="Let me look."))
    assert first == 'Let me look.<call>clock {"city": "Oslo"}</call>' + END


def test_a_template_that_drops_calls_is_not_followed(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, FIRST_ONLY)))
    with pytest.raises(TemplateNotFollowedError):
        chat.render(tool_talk("clock", "calendar"))


def test_a_template_without_tools_says_so(tmp_path):
    assert not Chat.load(str(write_model(tmp_path))).has_tools


HEADERS_STOP = DEFINED + (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|endoftext|>{{ m.content }}{% else %}<|im_end|>\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}<key>{{ k }}<value>{{ v }}{% endfor %}</call>{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_end|>\n{% endif %}"
)


def test_a_call_that_only_the_results_header_closes_ends_with_that_stop_token(tmp_path):
    """GLM's way: its stop tokens are the headers of the turns that others write."""
    folder = write_model(tmp_path, HEADERS_STOP)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    chat = Chat.load(str(folder))
    assert chat.has_tools
    assert counted_texts(chat, tool_talk("clock", "calendar")) == [
        "<call>clock<key>city<value>Oslo</call><call>calendar<key>city<value>Oslo</call><|endoftext|>",
        "Noon.<|im_start|>",
    ]
