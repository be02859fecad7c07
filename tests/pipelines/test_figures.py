"""Figures take the place of nothing that they were measured on, and are never lost for want of a file."""

import json

import pytest

from common.errors import EyasError, MachineError
from pipelines import figures


@pytest.mark.parametrize(
    "name", ["asked/question.jsonl", "asked/more.json", "head/config.json", "head", "q.jsonl"]
)
def test_what_is_measured_is_not_overwritten(tmp_path, name):
    for folder in ("asked", "head"):
        (tmp_path / folder).mkdir()
    (tmp_path / "asked" / "question.jsonl").write_text("{}")
    (tmp_path / "q.jsonl").symlink_to("asked/question.jsonl")
    data, folders = [f"{tmp_path}/asked", f"{tmp_path}/q.jsonl"], [f"{tmp_path}/head"]
    figures.require_place(f"{tmp_path}/new/figures.json", data, folders)
    with pytest.raises(EyasError, match=r"name (another place|a file)"):
        figures.require_place(f"{tmp_path}/{name}", data, folders)


def test_figures_that_no_disk_takes_are_told(tmp_path, monkeypatch, capfd):
    def full(url, value):
        raise MachineError(f"{url}: the disk is full")

    monkeypatch.setattr(figures.storage, "write_json", full)
    with pytest.raises(MachineError, match="the disk is full"):
        figures.write(f"{tmp_path}/a.json", {"sets": {"é": 1.5}})
    _, _, told = capfd.readouterr().err.partition("could not be written: ")
    assert json.loads(told) == {"sets": {"é": 1.5}}
