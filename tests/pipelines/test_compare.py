"""Runs side by side: what is ranked, what is said of runs that are not whole, where pages are written."""

import fcntl
import json
import math
import os
import shutil
import sys
import threading

import numpy as np
import pytest
from click.testing import CliRunner

from common.errors import EyasError
from common.lock import in_use, locked
from common.texts import printable
from pipelines import cli, compare
from pipelines.compare import page, readable, runs
from pipelines.compare.curves import thin
from pipelines.compare.tables import table, to_json
from tests.pipelines.made_runs import compared, data_of, write_run


def names(found):
    return [[row.name for row in group.rows] for group in found["groups"]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three runs of one store, in a folder that holds other things too."""
    folder = tmp_path_factory.mktemp("runs") / "sweep"
    for name, quality, seed in (("slow", 0.6, 0), ("fast", 1.0, 1), ("middle", 0.8, 2)):
        write_run(folder / name, quality=quality, seed=seed, rate=1e-4 * (1 + seed))
    (folder / "sweep.toml").write_text("")
    (folder / "notes").mkdir()
    return folder


def test_runs_are_ranked_by_the_head_in_best_and_what_differs_is_named(sweep):
    found = compared(sweep)
    assert names(found) == [["fast", "middle", "slow"]]
    (group,) = found["groups"]
    assert list(group.rows[0].differs) == ["seed", "learning_rate"]
    assert group.same["ttt_steps"] == "7"
    for row in group.rows:
        kept = [json.loads(line) for line in (sweep / row.name / "metrics.jsonl").read_text().splitlines()]
        measured = [line["evaluation"] for line in kept if "evaluation" in line]
        best = max(measured, key=lambda e: e["length_greedy"])
        assert (row.run.best.step, row.run.best.values) == (best["step"], best)
        assert row.run.last.values == measured[-1]
        trained = [line for line in kept if "loss" in line][-1]
        assert (row.run.tokens, row.run.seconds, row.run.loss) == tuple(
            trained[n] for n in ("tokens", "seconds", "loss")
        )
    text = table(found)
    assert text.index("1 best  fast") < text.index("2       middle") < text.index("3       slow")
    assert f"{group.rows[0].run.best.values['length_greedy_by_k'][3]:.3f}" in text


def test_of_several_kinds_what_heads_are_made_of_is_compared_with_their_own(tmp_path):
    """A field that one kind has is no difference of every run of another."""
    sizes = {"hidden_size": 576, "draft_vocab_size": 8192}
    for name, kind, head in (
        ("a", "eagle3", {"ffn": 1536, "layers": 1}),
        ("b", "eagle3", {"ffn": 1536, "layers": 2}),
        ("c", "other", {"blocks": 3}),
    ):
        write_run(tmp_path / name, kind=kind, head=sizes | head)
    (group,) = compared(tmp_path)["groups"]
    shown = {row.name: row.differs for row in group.rows}
    assert shown["a"] == {"kind": "eagle3", "head.layers": "1"}
    assert shown["c"] == {"kind": "other", "head.layers": "-"}


@pytest.mark.parametrize("width", [40, 90, 120, 160, 400])
def test_a_table_is_as_wide_as_the_terminal_and_keeps_what_runs_are_ranked_by(sweep, width):
    found = compared(sweep)
    whole, text = table(found).splitlines(), table(found, width).splitlines()
    heading, *rows = text[1:5]
    assert len(rows) == 3
    assert max(map(len, text[1:5])) <= max(width, 80)
    for name in ("run", "seed", "learning_rate", "best, k=7", "last, k=7", "state"):
        assert name in heading
    assert (text[1:5] == whole[1:5]) == (width >= max(map(len, whole[1:5])))
    assert ("have no room here" in "".join(text)) == (text[1:5] != whole[1:5])


def test_each_run_counts_once_however_it_is_named(sweep, monkeypatch):
    monkeypatch.chdir(sweep)
    assert sorted(*names(compared(sweep, sweep / "fast", "fast/", "."))) == ["fast", "middle", "slow"]
    assert names(compared("fast/.")) == [["fast"]]


def test_drafts_of_other_lengths_are_ranked_at_the_length_that_all_have(tmp_path):
    write_run(tmp_path / "long", K=7, quality=0.9)
    write_run(tmp_path / "short", K=3, quality=1.0)
    (group,) = compared(tmp_path)["groups"]
    # All seven tokens give the first more, at three the second is better.
    assert group.rows[1].run.best.values["length_greedy"] > 0
    assert (group.k, [row.name for row in group.rows]) == (3, ["short", "long"])
    (group,) = compared(tmp_path, k=7)["groups"]
    assert [row.name for row in group.rows] == ["long", "short"]
    assert group.ranked == 1
    with pytest.raises(EyasError, match="--k 8: no run drafts so many tokens at once; name 1 to 7"):
        compared(tmp_path, k=8)


def test_runs_of_different_stores_are_not_ranked_together(tmp_path):
    write_run(tmp_path / "a1", quality=0.6)
    write_run(tmp_path / "a2", quality=0.7)
    write_run(tmp_path / "b", quality=1.0, store="b" * 64, target="another")
    found = compared(tmp_path)
    assert names(found) == [["a2", "a1"], ["b"]]
    assert "2 stores" in found["notes"][0]
    assert "seed" not in found["groups"][0].rows[0].differs
    html = page.render(found["groups"], found["notes"])
    assert "1 run on store stores/x (bbbbbbbbbbbb) of another" in html
    assert [len(group["runs"]) for group in data_of(html)["groups"]] == [2, 1]


def cut(folder, text):
    place = folder / "metrics.jsonl"
    place.write_text(place.read_text() + text)


def test_a_run_that_is_not_whole_is_shown_with_what_it_has(tmp_path):
    write_run(tmp_path / "done", quality=1.0)
    cut(write_run(tmp_path / "half-line", reached=100, quality=0.9), '{"step": 102, "tok')
    write_run(tmp_path / "unmeasured", reached=100, eval_every=None)
    write_run(tmp_path / "silent", reached=0)
    os.remove(write_run(tmp_path / "new") / "metrics.jsonl")
    cut(
        write_run(tmp_path / "strange", reached=100, quality=0.5),
        '[]\n{"step": -1}\n{"step": 3, "loss": 1}\nNaN\n',
    )
    broken = write_run(tmp_path / "broken")
    (broken / "experiment.json").write_text('{"identity": {"config": {}, "store"')
    found = compared(tmp_path)
    (group,) = found["groups"]
    rows = {row.name: row.run for row in group.rows}
    assert list(rows)[:3] == ["done", "half-line", "strange"]
    assert sorted(list(rows)[3:]) == ["new", "silent", "unmeasured"]
    assert group.ranked == 3
    assert (rows["half-line"].step, rows["half-line"].state) == (100, "stopped")
    assert math.isfinite(rows["unmeasured"].loss)
    assert rows["unmeasured"].best is None
    assert math.isnan(rows["silent"].loss)
    assert rows["strange"].step == 100
    notes = "\n".join(found["notes"])
    assert "broken/experiment.json is not JSON" in notes
    assert "new/metrics.jsonl is missing: nothing has been logged yet" in notes
    line = len((tmp_path / "strange" / "metrics.jsonl").read_text().splitlines()) - 3
    assert f"strange/metrics.jsonl: line {line} and 3 more are damaged" in notes
    assert len(found["notes"]) == 3, "half a line is how a run looks that is being written"
    assert "stopped at 100 of 400" in table(found)
    json.dumps(to_json(found), allow_nan=False)
    assert data_of(page.render(found["groups"], found["notes"]))


@pytest.mark.parametrize(
    "value", [None, "x", True, 1e400, 1e308, 10**400, [], [[1.0]], [1.0] * 2000, {"a": 1}]
)
def test_a_value_of_the_wrong_kind_is_a_gap(tmp_path, value):
    run = write_run(tmp_path / "run", reached=40, eval_every=10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = dict.fromkeys(lines[-1]["evaluation"], value)
    lines[3] |= dict.fromkeys([name for name in lines[3] if name not in ("step", "loss")], value)
    lines += [{"step": 50, "loss": value}, {"step": 50, "evaluation": evaluation}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(run)
    one = found["groups"][0].rows[0].run
    assert one.best.step == 40
    highest = [x for curve in (one.trained, one.evaluated) for x in curve.high.values()]
    assert max(np.nanmax(x) for x in highest if np.isfinite(x).any()) < 1e6, "an axis could be drawn"
    assert data_of(page.render(found["groups"], []))["groups"][0]["runs"][0]["best"]["at"][0] == 40
    json.dumps(to_json(found), allow_nan=False)
    assert table(found)


def test_a_head_that_failed_in_a_sweep_says_why_and_a_damaged_note_of_it_is_one_line(tmp_path):
    write_run(tmp_path / "good", quality=0.9)
    write_run(tmp_path / "bad", quality=1.0, reached=100)
    write_run(tmp_path / "worse", reached=100, quality=0.5)
    reason = "steps 91 to 100 were all skipped: the loss is nan"
    (tmp_path / "bad" / runs.FAILED).write_text(json.dumps({"step": 100, "reason": reason}))
    (tmp_path / "worse" / runs.FAILED).write_text('{"step": "x"}')
    found = compared(tmp_path)
    (group,) = found["groups"]
    states = {row.name: row.run.state for row in group.rows}
    assert states == {"bad": "failed", "good": "done", "worse": "failed"}
    said = "\n".join(found["notes"])
    assert f"bad failed at step 100: {reason}" in said
    assert "worse/failed.json: step is" in said
    assert "failed at 100 of 400" in table(found)
    assert f"failed at step 100: {reason}" in page.render(found["groups"], found["notes"])


def test_runs_that_were_measured_on_more_and_on_fewer_answers_are_told_of(tmp_path):
    write_run(tmp_path / "short")
    lines = write_run(tmp_path / "long") / "metrics.jsonl"
    assert not compared(tmp_path)["notes"]
    lines.write_text(lines.read_text().replace('"counted": 16384', '"counted": 65536'))
    (note,) = compared(tmp_path)["notes"]
    assert note.startswith("16,384 to 65,536 held-out positions were measured, by the lengths of the runs")


def test_a_run_at_work_is_running_and_is_not_disturbed(tmp_path):
    run = write_run(tmp_path / "run", reached=100)
    with locked(str(run)):
        assert runs.read(str(run), 10).state == "running"
        with pytest.raises(EyasError, match="in use"), locked(str(run)):
            pass
    assert runs.read(str(run), 10).state == "stopped"


def test_a_glance_at_a_lock_does_not_stop_a_run_from_taking_it(tmp_path):
    place = write_run(tmp_path / "run") / ".lock"
    place.touch()
    glance = os.open(place, os.O_RDONLY)
    fcntl.flock(glance, fcntl.LOCK_SH)
    threading.Timer(0.03, os.close, [glance]).start()
    with locked(str(place.parent)):
        assert in_use(str(place.parent))


def test_what_holds_no_readable_run_is_one_line(tmp_path, sweep):
    with pytest.raises(EyasError, match="empty is no run and holds none"):
        compared(sweep, tmp_path / "empty")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "experiment.json").write_text("{}")
    with pytest.raises(EyasError, match=r"one/experiment.json has no identity; restore the file"):
        compared(tmp_path / "one")


def test_a_long_curve_keeps_its_ends_and_its_extremes():
    rng = np.random.default_rng(0)
    steps, values = np.arange(10_000.0), rng.normal(size=(10_000, 2))
    values[4321, 0], values[77, 1], values[9000:9005] = 50.0, -50.0, np.nan
    curve = thin((steps, 8 * steps, steps / 2), {"loss": values}, 100)
    assert len(curve.steps) == 100
    assert (curve.steps[0], curve.steps[-1], curve.tokens[-1]) == (0, 9999, 8 * 9999)
    assert (np.diff(curve.steps) > 0).all()
    assert (curve.high["loss"].max(), curve.low["loss"].min()) == (50.0, -50.0)
    assert ((curve.low["loss"] <= curve.mean["loss"]) & (curve.mean["loss"] <= curve.high["loss"])).all()
    short = thin((steps[:50], steps[:50], steps[:50]), {"loss": values[:50]}, 100)
    np.testing.assert_array_equal(short.mean["loss"], values[:50])


@pytest.mark.parametrize("folder", ["best", "last/deeper", "state"])
def test_nothing_is_written_where_training_writes(tmp_path, folder):
    run = write_run(tmp_path / "run")
    (run / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(run / folder)
    before = sorted(tmp_path.rglob("*"))
    for out in (run / folder / "page.html", tmp_path / "link" / "page.html"):
        with pytest.raises(EyasError, match="of a run, which training writes; name another place"):
            compared(run, out=str(out))
    with pytest.raises(EyasError, match=r"must be a page, such as .*/metrics.jsonl.html"):
        compared(run, out=str(run / "metrics.jsonl"))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_writes_a_page_beside_the_run_and_prints_what_programs_read(sweep, tmp_path, monkeypatch):
    run = shutil.copytree(sweep / "fast", tmp_path / "fast")
    done = CliRunner().invoke(cli.main, ["report", str(run), "--no-plots", "--json"])
    assert done.exit_code == 0, done.output
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    found = json.loads(done.stdout)
    (row,) = found["groups"][0]["runs"]
    assert row["best"]["length_greedy_by_k"][-1] == row["best"]["length_greedy"]
    assert (row["rank"], row["name"], row["state"], row["differs"]) == (1, "fast", "done", {})
    refused = CliRunner().invoke(cli.main, ["report", str(sweep)])
    assert refused.exit_code == 2
    assert "holds 3 runs; name one of them, or use `eyas compare" in refused.stderr
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.main, ["compare", str(sweep), "--no-plots"])
    assert "1 best  fast" in done.stdout
    assert "written: runs/compare.html" in done.stderr


def test_without_matplotlib_a_line_says_how_to_get_plots(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pipelines.compare.plots", raising=False)
    monkeypatch.delattr(compare, "plots", raising=False)
    found = compared(sweep, out=str(tmp_path / "page.html"))
    assert found["written"] == [str(tmp_path / "page.html")]
    assert (
        "no PNG and SVG: they need matplotlib (.venv/bin/pip install -e '.[plot]')" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (readable.number(2.31449), "2.314"),
        (readable.number(0.0002), "0.0002"),
        (readable.number(12345.6, 3), "12,300"),
        (readable.tokens(999.6e3), "1M"),
        (readable.tokens(850), "850"),
        (readable.duration(45.23), "45.2 s"),
        (readable.duration(750), "12 min 30 s"),
        (readable.duration(3599.7), "1 h 00 min"),
        (readable.duration(11100), "3 h 05 min"),
        (readable.duration(187200), "2 d 04 h"),
        (readable.duration(math.nan), "-"),
    ],
)
def test_numbers_read_well(shown, expected):
    assert shown == expected


@pytest.mark.parametrize("bound", [True, False])
def test_what_is_sampled_is_at_most_that_where_a_store_tells_no_more(tmp_path, bound):
    plots = pytest.importorskip("pipelines.compare.plots")
    folder = write_run(tmp_path / "run")
    place = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    for line in lines:
        if "evaluation" in line and bound:
            line["evaluation"]["sampled_at_most"] = True
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compared(folder)
    shown = [
        table(found),
        page.render(found["groups"], []),
        *(c.title for c in plots._charts(found["groups"][0])),
    ]
    for text in shown[:2]:
        for wanted in ("sampled, at most", "temperature 1 with sampled drafts, at most"):
            assert (wanted in text) == bound
    charts = plots._charts(found["groups"][0])
    assert ["at most" in chart.title for chart in charts] == [False, bound, False, False, False]


def test_nothing_of_a_run_that_a_terminal_would_obey_is_printed(tmp_path):
    """A run may be somebody else's; in JSON such a character is an escape, which means the same."""
    odd = "rate\x9b2J\x1b[31m"
    write_run(tmp_path / "a", **{odd: "\x9b2J\u202e\U000d73ee", "nested": {odd: 1}})
    write_run(tmp_path / "b", **{odd: "é"})
    for more in ([], ["--json"]):
        asked = ["compare", str(tmp_path), "--out", str(tmp_path / "c.html"), "--no-plots", *more]
        result = CliRunner().invoke(cli.main, asked)
        assert result.exit_code == 0
        assert [c for c in result.output if not c.isprintable() and c != "\n"] == []
    first, second = (run["differs"] for run in json.loads(result.stdout)["groups"][0]["runs"])
    assert {first[printable(odd)], second[printable(odd)]} == {"\x9b2J\u202e\U000d73ee", "é"}
