"""A folder is replaced as a whole, never seen half-written, and never taken from somebody else."""

import os
import threading

import pytest

from common import folders
from common.errors import EyasError
from common.folders import write_folder


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
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
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

    monkeypatch.setattr(folders, "write_bytes", full)
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
