"""A folder is replaced as a whole, by one writer at a time, and never one of somebody else."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common import folders, storage
from common.errors import EyasError, MachineError, RestartError
from common.folders import read_as_one, write_folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def head(weights: bytes, **config) -> dict[str, bytes]:
    """The files of a folder, the one that makes it whole last."""
    whole = json.dumps({"architectures": ["Head"]} | config).encode()
    return {"weights": weights, "README.md": weights, "config.json": whole}


@pytest.mark.parametrize("base", ["", "memory://"])
def test_a_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path, base):
    place = f"{base}{tmp_path}/new/head"
    for files in (head(b"1"), head(b"2"), head(b"3", wider=True), head(b"4", wider=True)):
        write_folder(place, files)
        found = {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_names(place)}
        assert found == files
    assert storage.list_names(f"{base}{tmp_path}/new") == ["head"]


@pytest.mark.parametrize("wider", [False, True])
def test_a_reader_never_finds_a_mixture(tmp_path, wider):
    """Weights and README of one writing carry its number; with `wider` the config does as well."""
    place, stop, found = tmp_path / "head", threading.Event(), []
    write_folder(str(place), head(b"0", number=0))

    def read():
        while not stop.is_set():
            try:
                first = json.loads((place / "config.json").read_bytes())["number"]
                weights = int((place / "weights").read_bytes())
                second = json.loads((place / "config.json").read_bytes())["number"]
            except FileNotFoundError:
                found.append("none yet" if wider else "lost")
                continue
            if first == second and wider and weights != first:
                found.append(f"{weights} beside {first}")

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write_folder(str(place), head(str(number).encode(), number=number if wider else 0))
    stop.set()
    reader.join()
    assert set(found) <= {"none yet"}


def test_files_of_others_stay_and_do_not_stop_a_run(tmp_path, capsys):
    place = tmp_path / "best"
    write_folder(str(place), head(b"1"))
    (place / ".cache").mkdir()
    (place / ".cache" / "tool").write_text("kept")
    (place / "tokenizer.json").write_text("kept")
    for files in (head(b"2"), head(b"3", wider=True)):
        write_folder(str(place), files)
        assert {name: (place / name).read_bytes() for name in files} == files
        assert (place / ".cache" / "tool").read_text() == (place / "tokenizer.json").read_text() == "kept"
        assert "also holds .cache, tokenizer.json, which stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize("wider", [False, True])
def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch, wider):
    place = tmp_path / "head"
    write_folder(str(place), head(b"old", wider=False))

    def full(path, data):
        if path.endswith("config.json"):
            raise OSError(28, "No space left on device")
        open(path, "wb").close()

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(MachineError, match="the disk is full; make room"):
        write_folder(str(place), head(b"new", wider=wider))
    assert content(place) == head(b"old", wider=False)
    assert os.listdir(tmp_path) == ["head"]


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("wider", [False, True])
def test_a_writer_killed_at_any_step_is_followed_by_the_next(tmp_path, monkeypatch, step, wider):
    place, steps = tmp_path / "head", iter(range(100))
    write_folder(str(place), head(b"old", wider=False))

    def killed_at(function):
        def step_or_die(*arguments):
            if Path(arguments[-1]).parent == place and next(steps) == step:
                raise KeyboardInterrupt
            return function(*arguments)

        return step_or_die

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at(os.replace))
        patch.setattr(os, "unlink", killed_at(os.unlink))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        try:
            write_folder(str(place), head(b"new", wider=wider))
        except KeyboardInterrupt:
            names = {path.name for path in place.iterdir()}
            assert "config.json" in names or wider
    write_folder(str(place), head(b"newer", wider=wider))
    assert content(place) == head(b"newer", wider=wider)
    assert os.listdir(tmp_path) == ["head"]


def test_of_two_writers_at_once_each_makes_the_whole_folder(tmp_path):
    """Neither fails, and what is there at the end is of one of them."""
    code = """
import json, sys
from common.folders import write_folder
for _ in range(60):
    config = json.dumps({"architectures": ["Head"], "of": sys.argv[2]}).encode()
    write_folder(sys.argv[1], {"a": sys.argv[2].encode(), "b": sys.argv[2].encode(), "config.json": config})
"""
    place = tmp_path / "head"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(place), who]) for who in ("one", "two")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    found = {name: data.decode() for name, data in content(place).items()}
    assert found["a"] == found["b"] == json.loads(found["config.json"])["of"]
    assert os.listdir(tmp_path) == ["head"]


def test_a_link_keeps_pointing_to_the_replaced_folder(tmp_path):
    write_folder(str(tmp_path / "head"), head(b"1"))
    (tmp_path / "best").symlink_to("head")
    write_folder(str(tmp_path / "best"), head(b"2"))
    assert (tmp_path / "best").is_symlink()
    assert content(tmp_path / "head") == head(b"2")


def test_a_copy_is_a_folder_like_the_original(tmp_path):
    write_folder(str(tmp_path / "best"), head(b"1"))
    write_folder(str(tmp_path / "best"), head(b"2"))
    subprocess.run(["cp", "-r", "best", "copy"], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "best")
    assert content(tmp_path / "copy") == head(b"2")
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "copy").iterdir())


@pytest.mark.parametrize(
    "there",
    [
        {"notes.txt": b"mine"},
        {"weights": b"mine"},
        {"weights": b"mine", "config.json": b'{"architectures": ["Target"]}'},
        {"weights": b"mine", "config.json": b"[]"},
        {"weights": b"mine", "config.json": b'{"archi'},
    ],
)
@pytest.mark.parametrize("base", ["", "memory://"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, base, there):
    place = f"{base}{tmp_path}/model"
    for name, data in there.items():
        storage.write_bytes(f"{place}/{name}", data)
    with pytest.raises(EyasError, match=r"already holds .*; name a new or an empty folder"):
        write_folder(place, head(b"1"))
    assert {name: storage.read_bytes(f"{place}/{name}") for name in storage.list_names(place)} == there


def test_a_strangers_file_of_any_depth_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_bytes(b"[" * 100_000)
    with pytest.raises(EyasError, match="already holds config"):
        write_folder(str(tmp_path), head(b"1"))
    assert (tmp_path / "config.json").read_bytes() == b"[" * 100_000


def test_a_file_is_no_folder_to_replace(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EyasError, match="is a file; name a folder"):
        write_folder(str(tmp_path / "notes.txt"), head(b"1"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("base", ["", "memory://"])
def test_a_folder_that_is_replaced_while_it_is_read_is_told_of_whatever_was_read(tmp_path, base):
    place = f"{base}{tmp_path}/head"

    def put(weights):
        write_folder(place, head(weights) | {"config.json": json.dumps({"architectures": [1]}).encode()})
        storage.write_bytes(f"{place}/model.safetensors", weights)

    def nonsense(weights):
        put(weights)  # as large as the others
        raise EyasError("of no sense")

    put(b"1")
    with read_as_one(place):
        storage.write_bytes(f"{place}/README.md", b"by somebody else")
    with pytest.raises(EyasError, match=r"^of no sense$"), read_as_one(place):
        raise EyasError("of no sense")
    for doing in (put, nonsense):
        with pytest.raises(RestartError, match="was replaced while the folder was read"), read_as_one(place):
            doing(b"2")


def test_a_reader_waits_for_the_file_that_makes_a_folder_whole(tmp_path, monkeypatch):
    """A bucket takes seconds between the first file and the last one."""
    place, files = str(tmp_path / "head"), head(b"1", wider=True)
    write_folder(place, files)
    (tmp_path / "head" / "config.json").unlink()
    (tmp_path / "head" / "model.safetensors").write_bytes(b"1")
    whole = threading.Timer(0.3, storage.write_bytes, (f"{place}/config.json", files["config.json"]))
    whole.start()
    with read_as_one(place):
        assert storage.read_bytes(f"{place}/config.json") == files["config.json"]
    whole.join()
    monkeypatch.setattr(folders, "_WRITING", 0.2)
    (tmp_path / "head" / "config.json").unlink()
    with pytest.raises(EyasError, match="is missing"), read_as_one(place):
        storage.read_bytes(f"{place}/config.json")
