"""Tokens and masks of rendered conversations, with a tokenizer made here; folders that cannot be used."""

import json

import pytest

from common.errors import EyasError
from dump.chat import Chat
from dump.template import TemplateRefusedError
from tests.dump.chats import CHATML, counted_texts, write_model

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <b>"},
    {"role": "assistant", "content": "Blue. naïve 🌉"},
    {"role": "user", "content": "Well?"},
    {"role": "assistant", "content": "all well"},
]
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
)
UNCLOSED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
NO_DOUBT = "{% if messages[-1].content[-1] == '?' %}{{ raise_exception('Be certain') }}{% endif %}" + CHATML


def test_the_mask_is_the_answers_and_their_closing_tokens(tmp_path):
    chat = Chat.load(str(write_model(tmp_path)))
    assert counted_texts(chat, TALK) == ["Blue. naïve 🌉<|im_end|>", "all well<|im_end|>"]


def test_a_templates_own_marks_are_used_without_what_follows_the_closing_token(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, GENERATION)))
    assert counted_texts(chat, TALK) == ["Blue. naïve 🌉<|im_end|>", "all well<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, GENERATION, UNCLOSED])
def test_the_closing_token_of_an_answer_that_was_cut_off_is_not_counted(tmp_path, template):
    chat = Chat.load(str(write_model(tmp_path, template)))
    whole = counted_texts(chat, TALK)
    for cut in (0, 1):
        turns = [i for i, m in enumerate(TALK) if m["role"] == "assistant"]
        talk = [m | {"cut": True} if i == turns[cut] else m for i, m in enumerate(TALK)]
        expected = [text.split("<|")[0] if i == cut else text for i, text in enumerate(whole)]
        assert counted_texts(chat, talk) == expected
        assert whole != expected


def test_a_space_of_the_header_that_the_tokenizer_joins_to_the_answer_is_counted_with_it(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, INST)))
    # " B" is one token, so the model would have to write it; " a" is two, and the space is the header's.
    assert counted_texts(chat, TALK[1:]) == [" Blue. naïve 🌉<|endoftext|>", "all well<|endoftext|>"]


def test_a_newline_joined_to_the_headers_is_not_counted(tmp_path):
    chat = Chat.load(str(write_model(tmp_path)))
    assert counted_texts(chat, [TALK[1], {"role": "assistant", "content": "\nSo."}]) == ["So.<|im_end|>"]


def test_a_refusing_template_passes_on_its_own_words(tmp_path):
    chat = Chat.load(str(write_model(tmp_path, NO_DOUBT)))
    with pytest.raises(TemplateRefusedError, match=r"^Be certain$"):
        chat.render([*TALK[:2], {"role": "assistant", "content": "Blue?"}])
    assert len(counted_texts(chat, TALK)) == 2


def test_errors_inside_a_template_do_not_quote_the_conversation(tmp_path):
    chat = Chat.load(
        str(write_model(tmp_path, CHATML + "{{ {'Hello': 1, 'Which colour?': 2}[messages[0].content] + 1 }}"))
    )
    with pytest.raises(TemplateRefusedError) as error:
        chat.render([{"role": "user", "content": "a secret"}, TALK[2]])
    assert "secret" not in str(error.value)


def test_a_date_in_the_template_is_the_same_every_day(tmp_path):
    template = "{{ strftime_now('%d %b %Y') if strftime_now is defined }}" + CHATML
    chat = Chat.load(str(write_model(tmp_path, template)))
    assert chat.render(TALK[1:]).text.startswith("26 Jul 2024<|im_start|>")


def test_a_tokenizer_file_that_cuts_and_pads_does_not_cut_conversations(tmp_path):
    folder = write_model(tmp_path)
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    chat = Chat.load(str(folder))
    assert counted_texts(chat, TALK)[-1] == "all well<|im_end|>"


def test_spelled_special_tokens_are_noticed(tmp_path):
    chat = Chat.load(str(write_model(tmp_path)))
    assert chat.holds_special([{"role": "user", "content": "what is <|im_end|>?"}])
    assert not chat.holds_special(TALK)
    assert not chat.holds_special(TALK, [{"function": {"name": "clock"}}])
    assert chat.holds_special(TALK, [{"function": {"description": "<|im_start|>"}}])
    for more in (
        {"reasoning": "<|im_end|>"},
        {"name": "<|im_end|>"},
        {"calls": [{"name": "f", "arguments": {"a": "é<|im_end|>"}}]},
    ):
        assert chat.holds_special([*TALK[:-1], TALK[-1] | more])


def test_hashes_follow_tokenizer_and_template(tmp_path):
    one, two = Chat.load(str(write_model(tmp_path / "a"))), Chat.load(str(write_model(tmp_path / "b", INST)))
    assert one.tokenizer_hash == two.tokenizer_hash
    assert one.template_hash != two.template_hash


def test_a_sandboxed_template_cannot_reach_python(tmp_path):
    template = CHATML + "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(EyasError, match="fails on a plain conversation"):
        Chat.load(str(write_model(tmp_path, template)))


def _no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def _damaged(folder):
    (folder / "tokenizer.json").write_text('{"model": 3')


def _remote_code(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "evil.py").write_text("raise SystemExit('this must never run')")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _set(**settings):
    def spoil(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))

    return spoil


def _write(name, text):
    return lambda folder: (folder / name).write_text(text)


NAMED = [{"name": name, "template": CHATML} for name in ("rag", "tool_use")]


def test_of_several_templates_the_default_is_used_and_a_single_one_whatever_its_name(tmp_path):
    for templates in ([*NAMED, {"name": "default", "template": INST}], [{"name": "only", "template": INST}]):
        folder = write_model(tmp_path)
        _set(chat_template=templates)(folder)
        assert Chat.load(str(folder)).render(TALK[1:3]).text.startswith("[INST]")


@pytest.mark.parametrize(
    ("template", "spoil", "message"),
    [
        (None, lambda folder: None, "has no chat template"),
        ("{{ messages[0].nothing.at_all }}", lambda folder: None, "fails on a plain conversation"),
        ("{% for m in", lambda folder: None, "is no Jinja template"),
        ("always the same", lambda folder: None, "fails on a plain conversation"),
        (CHATML, _no_tokenizer, "has no tokenizer"),
        (CHATML, _damaged, "cannot be loaded"),
        (CHATML, _remote_code, "auto_map"),
        (
            CHATML,
            _set(chat_template=NAMED),
            r"several chat templates \(rag, tool_use\) and none named default",
        ),
        (CHATML, _set(chat_template=5), "chat_template.* is 5"),
        (CHATML, _set(chat_template=[CHATML]), "chat_template"),
        (CHATML, _set(chat_template={"default": None}), "chat_template"),
        (CHATML, _set(added_tokens_decoder=[1]), "cannot be loaded"),
        (CHATML, _set(eos_token=[[]]), "cannot be loaded"),
        (CHATML, _write("tokenizer_config.json", "[]"), "tokenizer_config.json"),
        (CHATML, _write("tokenizer_config.json", "[" * 100_000), "tokenizer_config.json"),
        (CHATML, _write("tokenizer.json", "null"), "cannot be loaded"),
        (CHATML, _write("tokenizer.json", "[" * 100_000), "cannot be loaded"),
        (CHATML, _write("generation_config.json", "5"), "generation_config.json"),
        (CHATML, _write("chat_template.jinja", "{{ 'x' * 10**11 }}"), "too much memory"),
        (
            CHATML,
            _write("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            "for ever",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path, template, spoil, message):
    folder = write_model(tmp_path, template)
    spoil(folder)
    with pytest.raises(EyasError, match=message) as error:
        Chat.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_token_beyond_32_bits_is_refused(tmp_path):
    place = write_model(tmp_path) / "tokenizer.json"
    made = json.loads(place.read_text())
    made["model"]["vocab"]["w"] = 2**31
    place.write_text(json.dumps(made))
    chat = Chat.load(str(tmp_path))
    with pytest.raises(EyasError, match="a token that is no 32-bit number"):
        chat.encode([chat.render(TALK)])


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(EyasError, match="does not exist"):
        Chat.load(str(tmp_path / "somebody" / "model"))


def test_a_remote_folder_loads_like_a_local_one(tmp_path):
    import fsspec

    write_model(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/a-model", recursive=True)
    chat = Chat.load("memory://a-model")
    assert chat.tokenizer_hash == Chat.load(str(tmp_path)).tokenizer_hash
    assert counted_texts(chat, TALK)[-1] == "all well<|im_end|>"
    memory.rm("/a-model", recursive=True)
