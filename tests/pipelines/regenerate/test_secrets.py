"""Keys go to their servers and nowhere else; what cannot be is refused."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from common.errors import EyasError
from pipelines import cli
from pipelines.regenerate.run import run
from tests.pipelines.regenerate.asking import ask
from tests.pipelines.regenerate.chat_server import chat_server


def test_keys_are_sent_to_their_servers_and_written_nowhere(config, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("EYAS_API_KEY", "sk-common-1234")
    monkeypatch.setenv("EYAS_API_KEY_2", "sk-second-5678")
    with chat_server(lambda r: "503") as one, chat_server() as two:
        ask(config, one, two, patience=5.0)
        assert {h["Authorization"] for h in one.headers} == {"Bearer sk-common-1234"}
        assert {h["Authorization"] for h in two.headers} == {"Bearer sk-second-5678"}
        printed = capfd.readouterr()
        assert "503: bad Bearer (the key)" in printed.err
    with chat_server(lambda r: "401") as one, pytest.raises(EyasError) as error:
        ask(replace(config, out=str(tmp_path / "b.jsonl")), one)
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    shown = [printed.out, printed.err, str(error.value), repr(error.value)]
    assert len(written) > 5
    assert not any(b"sk-" in data for data in written)
    assert not any("sk-" in text for text in shown)


def test_a_key_that_no_header_can_have_is_not_told(config, monkeypatch):
    monkeypatch.setenv("EYAS_API_KEY", "sk-1\nX-Evil: 1")
    with pytest.raises(EyasError, match=r"^the environment's EYAS_API_KEY holds characters") as error:
        run(config)
    assert "sk-1" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("endpoint", ("http://127.0.0.1:1/sk-common-1234/v1",)),
        ("endpoint", ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/sk-common-1234")),
        ("served_model", "sk-common-1234"),
        ("extra", '{"user": "sk-common-1234"}'),
    ],
)
def test_a_key_in_what_is_recorded_is_refused(config, monkeypatch, tmp_path, field, value):
    monkeypatch.setenv("EYAS_API_KEY", "sk-common-1234")
    with pytest.raises(EyasError, match="the key in EYAS_API_KEY is also part of an address") as error:
        run(replace(config, **{field: value}))
    assert "sk-" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("endpoint", ("http://user:secret@host/v1",), "endpoint 1 must be an address without user, password"),
        ("endpoint", ("http://host/v1?key=secret",), "endpoint 1 must be an address without user, password"),
        ("endpoint", ("http://a/v1", "http://b/v1#secret"), "endpoint 2 must be an address without"),
        ("endpoint", ("http://host/v1?",), "endpoint 1 must be an address without user, password"),
        ("endpoint", ("secret:8000",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", ("http://host:secret",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", ("http://secret..b/v1",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", (f"http://{'secret' * 11}.org",), "endpoint 1 must be an address such as http://local"),
        ("endpoint", ("http://.:80",), "endpoint 1 must be an address such as http://localhost"),
        ("endpoint", ("http://a/v1", "http://a/v1/"), "an endpoint is named twice"),
        ("endpoint", (), "endpoint must be a tuple of at least one text"),
        ("endpoint", ("", "http://user:secret@host"), "endpoint must be a tuple of at least one text"),
        ("out", "answers.json", "out='answers.json' must be a file whose name ends in .jsonl"),
        ("out", "gs://bucket/answers.jsonl", "must be a local file, which grows by lines"),
        ("extra", "[]", "must be an object of JSON"),
        ("extra", "{", "must be an object of JSON"),
        ("extra", '{"x": NaN}', "must be an object of JSON"),
        ("extra", '{"seed": 3}', "must not have seed"),
        ("extra", '{"a": {"X-API-Key" : "sk-1"}}', "must not have X-API-Key: keys are given by EYAS_API_KEY"),
        ("top_p", 1.5, "top_p=1.5 must be"),
        ("served_model", "", "served_model='' must be"),
    ],
)
def test_what_cannot_be_is_refused_without_repeating_a_secret(config, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(config, **{field: value})
    assert "secret" not in str(error.value)


def test_a_secret_in_an_address_is_not_told_by_the_command_line():
    asked = ["regenerate", "--served-model", "m", "--out", "a.jsonl", "--endpoint"]
    result = CliRunner().invoke(cli.main, [*asked, "http://me:secret@host/v1"])
    assert result.exit_code == 2
    assert "endpoint 1 must be an address without user, password" in result.stderr
    assert "secret" not in result.output
