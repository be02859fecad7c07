"""Codecs are compared by heads of the same rows and seeds, on the same held-out rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from common import storage
from common.errors import EyasError
from common.store import Store
from pipelines import cli
from pipelines.codecs import compare
from pipelines.codecs.compare import Line, Way, bytes_a_token, table, ways
from pipelines.codecs.config import CodecsConfig
from tests.pipelines.test_whole_way import CHATS, write_target


def test_a_line_stands_beside_the_standards():
    made = [
        (Way("bfloat16"), 4616.0, [1.2, 1.3]),
        (Way("int8", 16), 1844.0, [1.236, 1.287]),
    ]
    lines = [Line(way, size, size / 4624, {"greedy": x, "sampled": x}) for way, size, x in made]
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(lines).splitlines()]
    assert {len(row) for row in found} == {7}
    assert found[2] == ["bfloat16", "last state", "4,616", "99.8%"] + ["1.250 ± 0.071"] * 2 + [""]
    assert found[3][:4] == ["int8", "16 logits", "1,844", "39.9%"]
    assert found[3][6] == "+1.0% ± 2.8%"  # 1.236 / 1.2 and 1.287 / 1.3


def test_the_standard_comes_first_and_every_way_has_a_store_of_its_own():
    found = ways((8, 64))
    assert found[0] == Way("bfloat16")
    assert len({way.name for way in found}) == len(found)
    assert Way("bfloat16", 64) in found


@pytest.mark.parametrize("wanted", [{"topk": (8, 100_000)}, {"draft_vocab": 100_000}])
def test_more_tokens_than_the_target_has_are_refused_before_anything_is_made(tmp_path, wanted):
    write_target(tmp_path / "model")
    config = CodecsConfig(str(tmp_path / "model"), (CHATS,), str(tmp_path / "out"))
    config = replace(config, **{"topk": (8,), "draft_vocab": 64} | wanted)
    with pytest.raises(EyasError, match=rf"{next(iter(wanted))}=100000, but .* tokens; give fewer"):
        compare.run(config)
    assert not (tmp_path / "out").exists()


def test_what_is_for_answers_alone_is_refused_without_them():
    for name, value in {"max_tokens": 9, "temperature": 0.0, "slots": 2}.items():
        with pytest.raises(ValueError, match=f"{name}={value} has no meaning with answer=False"):
            CodecsConfig("model", ("data",), "out", answer=False, **{name: value})


def test_stores_of_other_rows_are_refused(tmp_path, monkeypatch):
    """What was begun with other options would be compared with what comes."""
    monkeypatch.setattr(compare.dump, "run", lambda config: None)
    write_target(tmp_path / "model")
    first = CodecsConfig(str(tmp_path / "model"), (CHATS,), str(tmp_path / "out"), length=128, holdout=0.4)
    for config in (first, first, replace(first, epochs=1.0)):
        compare._store(config, Way("int8"), config.data)
    for changed in ({"length": 64}, {"holdout": 0.3}, {"conversations": 9}):
        with pytest.raises(EyasError, match="stores/int8 was prepared in another way"):
            compare._store(replace(first, **changed), Way("int8"), first.data)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_comparison_continues_where_it_was(tmp_path):
    write_target(tmp_path / "model")
    out = tmp_path / "out"
    command = ["bench-codecs", "--model", tmp_path / "model", "--out", out, "--data", CHATS, "--topk", 4]
    command += ["--length", 128, "--conversations", 12, "--max-tokens", 24, "--holdout", 0.4, "--epochs", 1]
    command += ["--seeds", 1, "--ttt-steps", 2, "--draft-vocab", 64]

    def run():
        result = CliRunner().invoke(cli.main, [str(x) for x in command], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    text = run()
    assert text == storage.read_bytes(f"{out}/table.md").decode()
    figures = json.loads((out / "figures.json").read_text())["lines"]
    assert len(figures) == 5 == text.count("\n| ") - 2
    for one in figures:
        assert len(one["lengths"]["greedy"]) == 1
        assert all(1 <= length <= 3 for length in one["lengths"]["greedy"] + one["lengths"]["sampled"])
    sizes = {path.name: bytes_a_token(Store.open(str(path))) for path in (out / "stores").iterdir()}
    hidden = Store.open(f"{out}/stores/int8").features["target"]["hidden_size"]
    assert sizes["bfloat16"] == 8 * hidden + 8
    assert sizes["int8"] == 4 * hidden + 16 + 8
    assert sizes["int8-topk4"] == sizes["int8"] + 4 * 6  # so few rows that all are among the first
    stamps = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*.safetensors")}
    assert run() == text
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
