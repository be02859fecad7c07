"""Files are written whole or not at all, and no name leads out of its folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import known_implementations

from common import kvstore, lock, storage, zarr
from common.errors import EyasError, MachineError
from dump.conversations import DataFile
from dump.tokenizer_files import load_tokenizer


@pytest.mark.parametrize(
    "name", ["../secret", "a/../../secret", "/etc/passwd", "..", "a\\b", "gs://b/c", "a\0b", "\ud800"]
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(EyasError, match="points outside of model"):
        storage.join("model", name)


def test_names_inside_are_joined():
    assert storage.join("gs://b/model/", "sub", "../config.json") == "gs://b/model/config.json"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = f"{tmp_path}/a.json"
    storage.write_json(path, {"old": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        storage.write_json(path, {"new": 2})
    assert storage.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_numbers_that_json_does_not_know_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(f"{tmp_path}/a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(EyasError, match=r"a\.json is missing; check the path"):
        storage.read_json(f"{tmp_path}/a.json")
    storage.write_bytes(f"{tmp_path}/a.json", b'{"cut": ')
    with pytest.raises(EyasError, match="is not JSON") as found:
        storage.read_json(f"{tmp_path}/a.json")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": NaN}', "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is no number"),
        (b"[" + b"9" * 5000 + b"]", "is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is named twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'"\xed\xa0\x80"', "can't decode"),  # half a character, without an escape
        ('"\\ud800"'.encode("utf-16"), "can't decode"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_what_is_not_json_by_the_standard_is_one_line(tmp_path, data, problem):
    storage.write_bytes(f"{tmp_path}/a.json", data)
    with pytest.raises(EyasError, match=problem) as found:
        storage.read_json(f"{tmp_path}/a.json")
    assert "\n" not in str(found.value)
    assert str(found.value).startswith(f"{tmp_path}/a.json")


def test_a_folder_and_a_huge_file_are_no_json(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(EyasError, match="is a folder"):
        storage.read_json(f"{tmp_path}/a.json")
    with pytest.raises(EyasError, match=r"is missing|inside of a file"):
        storage.read_json(f"{Path(__file__)}/a.json")
    with open(tmp_path / "b.json", "wb") as file:
        file.truncate(10**10)
    with pytest.raises(EyasError, match="has more than the 200,000,000 bytes"):
        storage.read_json(f"{tmp_path}/b.json")


@pytest.mark.parametrize("value", [None, 5, [], "text"])
def test_another_value_than_an_object_is_refused(tmp_path, value):
    storage.write_json(f"{tmp_path}/a.json", value)
    with pytest.raises(EyasError, match=rf"a\.json holds a JSON {type(value).__name__} where an object"):
        storage.read_object(f"{tmp_path}/a.json")


def test_urls_are_read_and_listed_like_folders():
    storage.write_bytes("memory://bucket/store/b.json", b"{}")
    storage.write_bytes("memory://bucket/store/a/c.json", b"{}")
    assert storage.exists("memory://bucket/store/b.json")
    assert storage.list_names("memory://bucket/store") == ["a", "b.json"]
    assert storage.list_names("memory://bucket/nothing") == []
    assert storage.read_json("memory://bucket/store/b.json") == {}
    storage.require_folder("memory://bucket/store")


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "file").touch()
    storage.require_folder(f"{tmp_path}/new/store")
    for place in ("file", "file/store"):
        with pytest.raises(EyasError, match=f"{tmp_path}/file is a file"):
            storage.require_folder(f"{tmp_path}/{place}")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    def killed(old, new):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            storage.write_bytes(f"{tmp_path}/a.json", b"1")
    for name in (".hidden", "b.partial"):
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 3
    storage.remove_partial(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.partial"]
    storage.remove_partial(f"{tmp_path}/nothing")
    storage.remove_partial("memory://bucket/store")


KILLED = """
import os, signal
from common import storage
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_of_a_file_left_is_gone_with_the_next_one(tmp_path):
    """Whatever the file is: a page, a run's description, figures."""
    for _ in range(2):
        write = f"storage.write_bytes({f'{tmp_path}/a.json'!r}, b'1')"
        assert subprocess.run([sys.executable, "-c", KILLED + write]).returncode == -signal.SIGKILL
        (left,) = os.listdir(tmp_path)
        assert storage.is_partial(left)
    (tmp_path / ".a.json.of-now.partial").touch()  # somebody has just begun
    storage.write_bytes(f"{tmp_path}/a.json", b"2")
    assert sorted(os.listdir(tmp_path)) == [".a.json.of-now.partial", "a.json"]


def test_what_another_writer_is_writing_stays(tmp_path, monkeypatch):
    """Seen from another process, in the middle of the write."""
    fsync = os.fsync
    look = f"from common import storage; storage.remove_partial({str(tmp_path)!r})"

    def between(handle):
        subprocess.run([sys.executable, "-c", look], check=True)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", between)
    storage.write_bytes(f"{tmp_path}/a.json", b"1")
    assert storage.read_bytes(f"{tmp_path}/a.json") == b"1"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("written", ["../a b/ä", "./x/../ä", "ä/", "~/ä", "file://{}/ä"])
def test_every_way_to_write_a_path_leads_there(tmp_path, monkeypatch, written):
    home = tmp_path / "a b"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    place = written.format(home)
    storage.write_json(f"{place.rstrip('/')}/x.json", {})
    assert (home / "ä" / "x.json").read_text() == "{}\n"
    assert storage.list_names(place) == ["x.json"]
    array = zarr.open_array(f"{place}/array", zarr.describe((2, 3), np.dtype(np.int32)), create=True)
    array.write(np.ones((2, 3), np.int32)).commit.result()
    assert zarr.read_rows({"a": array}, np.arange(2))["a"].all()
    assert (home / "ä" / "array" / "zarr.json").exists()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "read",
    [
        storage.read_bytes,
        storage.size,
        storage.read_json,
        lambda url: storage.as_local(url).__enter__(),
        lambda url: DataFile.open(url, print),
        lambda url: load_tokenizer(os.path.dirname(url)),
        lambda url: kvstore.create_file(url, b"{}"),
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    place = str(tmp_path / "a.jsonl")
    os.mkfifo(place)
    with pytest.raises(EyasError, match=r"a\.jsonl is a pipe or a device"):
        read(place)


def test_a_lock_that_is_a_pipe_is_looked_at_without_waiting(tmp_path):
    os.mkfifo(tmp_path / lock.FILE)
    assert not lock.in_use(str(tmp_path))


@pytest.mark.parametrize("call", [storage.read_bytes, storage.exists, storage.list_names, storage.size])
def test_a_kind_of_place_whose_package_is_missing_is_one_line(monkeypatch, call):
    missing = {"class": "no_such_package.FileSystem", "err": "Install no_such_package"}
    monkeypatch.setitem(known_implementations, "odd", missing)
    with pytest.raises(EyasError, match=r"odd://a/b needs a package .*Install no_such_package"):
        call("odd://a/b")


@pytest.mark.parametrize("url", ["gs://", "gs:///x", "gcs:///x/y"])
def test_a_url_without_a_bucket_is_told_before_the_network_is_asked(url):
    with pytest.raises(EyasError, match="names no bucket"):
        storage.read_bytes(url)


@pytest.mark.parametrize("url", ["gs:/bucket/x", "hf:/datasets/a/b", "https:/example.org/x"])
def test_a_url_with_one_slash_is_no_folder_here(url):
    for use in (storage.exists, storage.list_names, storage.read_bytes, kvstore.folder):
        with pytest.raises(EyasError, match="has one slash behind"):
            use(url)


def test_a_scheme_that_is_unknown_is_a_mistake_of_who_wrote_it():
    with pytest.raises(EyasError, match="Protocol not known: GS") as found:
        storage.exists("GS://bucket/x")
    assert found.value.exit_code == 2


@pytest.mark.parametrize("url", ["memory://a/b", "hf://datasets/a/b", "https://example.org/a"])
def test_where_arrays_are_not_kept_is_refused(url):
    with pytest.raises(EyasError, match="arrays are not kept there"):
        kvstore.folder(url)
