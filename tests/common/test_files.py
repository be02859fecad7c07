"""Small files are written whole or not at all, and no name leads out of its folder."""

import os

import pytest

from common import files
from common.errors import EyasError


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "..", "a\\b", "gs://b/c"])
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(EyasError, match="points outside of model"):
        files.join("model", name)


def test_names_inside_are_joined():
    assert files.join("gs://b/model/", "sub", "../config.json") == "gs://b/model/config.json"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = f"{tmp_path}/a.json"
    files.write_json(path, {"old": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"new": 2})
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_numbers_that_json_does_not_know_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(f"{tmp_path}/a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(EyasError, match=r"a\.json is missing; check the path"):
        files.read_json(f"{tmp_path}/a.json")
    files.write_bytes(f"{tmp_path}/a.json", b'{"cut": ')
    with pytest.raises(EyasError, match="is not JSON") as found:
        files.read_json(f"{tmp_path}/a.json")
    assert "\n" not in str(found.value)


def test_urls_are_read_and_listed_like_folders():
    files.write_bytes("memory://bucket/store/b.json", b"{}")
    files.write_bytes("memory://bucket/store/a/c.json", b"{}")
    assert files.exists("memory://bucket/store/b.json")
    assert files.list_names("memory://bucket/store") == ["a", "b.json"]
    assert files.list_names("memory://bucket/nothing") == []
    assert files.read_json("memory://bucket/store/b.json") == {}
    files.require_folder("memory://bucket/store")


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "file").touch()
    files.require_folder(f"{tmp_path}/new/store")
    for place in ("file", "file/store"):
        with pytest.raises(EyasError, match=f"{tmp_path}/file is a file"):
            files.require_folder(f"{tmp_path}/{place}")


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    def killed(old, new):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            files.write_bytes(f"{tmp_path}/a.json", b"1")
    for name in (".hidden", "b.partial"):
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 3
    files.remove_partial(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".hidden", "b.partial"]
    files.remove_partial(f"{tmp_path}/nothing")
    files.remove_partial("memory://bucket/store")
