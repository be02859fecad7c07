"""Files and folders are written whole or not at all, and no name leads out of its folder."""

import os
import threading

import pytest

from common import storage
from common.errors import EyasError
from common.storage import write_folder


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "..", "a\\b", "gs://b/c"])
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
    with pytest.raises(OSError, match="No space"):
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


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path):
    for files in ({"a": b"1", "b": b"2"}, {"a": b"3", "b": b"4", "c": b"5"}):
        write_folder(str(tmp_path / "new" / "head"), files)
        assert content(tmp_path / "new" / "head") == files
    assert os.listdir(tmp_path / "new") == ["head"]


def test_a_reader_finds_a_whole_folder_at_every_moment(tmp_path):
    place, stop, misses = tmp_path / "head", threading.Event(), []
    write_folder(str(place), {"a": b"0"})

    def read():
        while not stop.is_set():
            if not os.path.exists(place):
                misses.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_folder(str(place), {"a": str(number).encode()})
    stop.set()
    reader.join()
    assert not misses


def test_replaces_where_the_file_system_cannot_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_exchange", lambda a, b: False)
    for files in ({"a": b"1"}, {"a": b"2"}):
        write_folder(str(tmp_path / "head"), files)
        assert content(tmp_path / "head") == files
    assert os.listdir(tmp_path) == ["head"]


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    write_folder(str(tmp_path / "head"), {"a": b"old", "b": b"old"})

    def full(path, data):
        if path.endswith("b"):
            raise OSError(28, "No space left on device")
        open(path, "wb").close()

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(EyasError, match="No space left on device"):
        write_folder(str(tmp_path / "head"), {"a": b"new", "b": b"new"})
    assert content(tmp_path / "head") == {"a": b"old", "b": b"old"}
    assert os.listdir(tmp_path) == ["head"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".head.partial").mkdir()
    (tmp_path / ".head.partial" / "stray").write_bytes(b"x")
    write_folder(str(tmp_path / "head"), {"a": b"1"})
    assert os.listdir(tmp_path) == ["head"]
    assert content(tmp_path / "head") == {"a": b"1"}


def test_a_link_keeps_pointing_to_the_replaced_folder(tmp_path):
    write_folder(str(tmp_path / "head"), {"a": b"1"})
    (tmp_path / "best").symlink_to("head")
    write_folder(str(tmp_path / "best"), {"a": b"2"})
    assert (tmp_path / "best").is_symlink()
    assert content(tmp_path / "head") == {"a": b"2"}


def test_refuses_a_folder_of_somebody_else_a_file_and_a_bucket(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place, message in (
        (str(tmp_path), "already holds notes.txt"),
        (str(tmp_path / "notes.txt"), "is a file"),
        ("gs://bucket/head", "is not a local folder"),
    ):
        with pytest.raises(EyasError, match=message):
            write_folder(place, {"a": b"1"})
    assert (tmp_path / "notes.txt").read_text() == "mine"
