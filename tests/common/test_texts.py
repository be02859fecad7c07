"""What web addresses hold of secrets is told nowhere, and nothing that a terminal obeys."""

import pytest

from common.errors import EyasError, RestartError
from common.progress import note
from common.texts import first_line, without_secrets


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:pw@host/a.jsonl is missing", "https://...@host/a.jsonl is missing"),
        ("url='https://h/a?sig=pw&b=1'); check it", "url='https://h/a?...'); check it"),
        ("s3://key:pw@b/a and https://h/b.json?pw: 404", "s3://...@b/a and https://h/b.json?... 404"),
        ("hf://datasets/o/n@main/a.jsonl, gs://b/c?d", "hf://datasets/o/n@main/a.jsonl, gs://b/c?d"),
        ("what? me@host, http://h:80/v1", "what? me@host, http://h:80/v1"),
    ],
)
def test_errors_and_notes_have_no_secrets(text, told, capfd):
    assert without_secrets(text) == told
    assert str(EyasError(text)) == str(RestartError(text)) == told
    note(text)
    assert capfd.readouterr().err == f"{told}\n"


def test_no_note_moves_a_cursor(capfd):
    note("\na\x1b[2J\rb\u202ec — é")
    assert capfd.readouterr().err == "\na\\x1b[2J\\rb\\u202ec — é\n"


@pytest.mark.parametrize(
    ("text", "told"), [("one\ntwo", "one"), ("\n one ", "one"), ("", "ValueError"), ("x" * 300, "x" * 200)]
)
def test_of_what_a_library_says_one_line_is_told_and_never_nothing(text, told):
    assert first_line(ValueError(text)) == told
