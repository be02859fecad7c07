"""A sweep's file: what it says is what is trained, and a mistake in it is one line that names it."""

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from common.errors import EyasError
from pipelines import recipes
from pipelines.cli import main
from pipelines.sweep import default_out, read
from tests.train import small_store

SWEEPS = Path(__file__).parents[2] / "pipelines" / "sweeps"


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "rates.toml").write_text(text)
        return str(tmp_path / "rates.toml")

    return write


def test_settings_experiments_and_a_grid(file):
    url = file(
        """
        [settings]
        steps = 20
        learning_rate = 3e-4
        betas = [0.9, 0.99]
        [[experiments]]
        name = "k9"
        ttt_steps = 9
        [[experiments]]
        name = "plain"
        [grid]
        learning_rate = [1e-4, 2e-4]
        seed = [0, 1]
        """
    )
    found = read(url, "stores/x", "runs/rates/", {"draft_vocab": 100, "steps": 7})
    assert list(found) == ["k9", "plain"] + [
        f"learning_rate={rate},seed={seed}" for rate in ("0.0001", "0.0002") for seed in (0, 1)
    ]
    assert {(c.steps, c.betas, c.store, c.draft_vocab) for c in found.values()} == {
        (20, (0.9, 0.99), "stores/x", 100)
    }
    assert (found["k9"].ttt_steps, found["k9"].learning_rate) == (9, 3e-4)
    assert found["plain"].out == "runs/rates/plain"
    last = found["learning_rate=0.0002,seed=1"]
    assert (last.learning_rate, last.seed, last.ttt_steps) == (2e-4, 1, 7)
    assert default_out(url) == "runs/rates"


def test_another_optimiser_than_the_recipes_has_a_rate_of_its_own(file):
    url = file('[grid]\noptimizer = ["adamw", "muon"]')
    found = read(url, "stores/x", "runs/rates", {"optimizer": "adamw", "learning_rate": 1e-4})
    assert [found[f"optimizer={name}"].learning_rate for name in ("adamw", "muon")] == [1e-4, None]


@pytest.mark.parametrize("url", sorted(SWEEPS.glob("*.toml")), ids=lambda url: url.name)
def test_every_sweep_that_is_here_goes_with_every_recipe(url):
    for name in recipes.names():
        assert read(str(url), "stores/x", "runs/x", recipes.load(name).train)


ONE = '[[experiments]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[settings", "rates.toml is not TOML: "),
        ("\x00", "rates.toml is not TOML: "),
        ("", "has no experiments; add"),
        ("[setings]\nsteps = 3", "setings is unknown; did you mean settings?"),
        ("steps = 3", "steps is unknown"),
        (
            "[settings]\nlearnig_rate = 1e-4",
            "[settings]: learnig_rate is unknown; did you mean",
        ),
        ("[settings]\nlearning-rate = 1e-4", "learning-rate is unknown; did you mean learning_rate?"),
        ("[settings]\nout = 'x'", "out is unknown"),
        ("settings = 3", "settings must be a table; write [settings]"),
        ("[experiments]\nname = 'a'", "write [[experiments]] above each"),
        ("[[experiments]]\nsteps = 3", "experiment 1: name=None must be text that can be a folder"),
        ("[[experiments]]\nname = '../a'", "experiment ../a: name='../a' must be text that can be a folder"),
        ("[[experiments]]\nname = '.hidden'", "not beginning with a sign"),
        (ONE + ONE, "experiment a: two have this name"),
        (ONE + "ttt_step = 3", "experiment a: ttt_step is unknown; did you mean ttt_steps?"),
        (ONE + "ttt_steps = '3'", "experiment a: ttt_steps='3' must be a whole number"),
        (ONE + "ttt_steps = 0", "experiment a: ttt_steps=0 must be a whole number of at least 1"),
        (ONE + "seed = true", "experiment a: seed=True must be a whole number"),
        (ONE + "learning_rate = nan", "experiment a: learning_rate=nan must be a number"),
        (ONE + "loss = 'hard'", "experiment a: loss='hard' is unknown; use one of cross-entropy"),
        (ONE + "epochs = 1e308", "experiment a: epochs=1e+308 must be a number of at most 1000000"),
        ("[[experiments]]\nname = 'compare.html'", "a file of that name lies beside the heads' folders"),
        ("x = " + "[" * 10_000, "rates.toml is not TOML: "),
        (ONE + "batch_rows = 8", "experiment a: batch_rows is of the stream that all share; move it"),
        ("[grid]\nseed = 3", "[grid]: seed must be a list of values"),
        ("[grid]\nseed = []", "[grid]: seed must be a list of values"),
        ("[grid]\nsed = [1]", "[grid]: sed is unknown; did you mean seed?"),
        ("[grid]\nseed = [1, 1]", "experiment seed=1: two have this name"),
        ("[grid]\ndp = [1, 2]", "experiment dp=1: dp is of the stream"),
        ("[grid]\ninit = ['a b']", "init=a b cannot be a folder's name"),
        ('[grid]\ninit = ["a\\nb"]', r"init=a\nb cannot be a folder's name"),
        ("[[experiments]]\nname = 'a'\n\"b\\nc\" = 1", r"experiment a: b\nc is unknown"),
        ('[[experiments]]\nname = "a\\nb"', r"experiment a\nb: name='a\nb' must be text"),
        ("[grid]\nseed = [" + "1," * 1001 + "]", "has 1,001 experiments, more than 1,000; divide it"),
        (
            "[grid]\n"
            + "\n".join(f"{x} = [{'1,' * 99}]" for x in ("seed", "steps", "ffn", "layers", "noise")),
            "has 9,509,900,499 experiments",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(file, text, said):
    with pytest.raises(EyasError, match=re.escape(said)) as refused:
        read(file(text), "s", "o", {})
    assert "\n" not in str(refused.value)
    assert "rates.toml" in str(refused.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(EyasError, match=r"^\S+none.toml is missing; check the path$"):
        read(str(tmp_path / "none.toml"), "s", "o", {})
    assert os.listdir(tmp_path) == []


def refused(result):
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def test_the_command_refuses_a_mistake_before_it_writes_anything(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = small_store.write_store(str(tmp_path / "store"))
    place = ["--store", store, "--model", f"{store}/target"]
    before = sorted(tmp_path.rglob("*"))
    for text, said in (
        (ONE + "draft_vocab = 65", "experiment a: a draft vocabulary of 65 tokens; the target has 64"),
        (ONE + "teacher = 'stored'", "experiment a: .* has no logits to teach with"),
        (ONE + "aux_layers = [2, 3]", "experiment a: .*3"),
        (ONE + "log_to = ['nowhere']", "experiment a: log_to=.* is unknown"),
        ("[settings]\ndp = 64\nbatch_rows = 64\n" + ONE, "needs 64 devices"),
    ):
        assert re.search(said, refused(CliRunner().invoke(main, ["sweep", file(text), *place])))
    assert sorted({*tmp_path.rglob("*")} - {tmp_path / "rates.toml"}) == before


@pytest.mark.slow
def test_the_command_trains_compares_and_says_what_failed(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = small_store.write_store(str(tmp_path / "store"))
    settings = "[settings]\nsteps = 3\nttt_steps = 2\ndraft_vocab = 32\ninit = 'normal'\n"
    url = file(f"{settings}[grid]\nlearning_rate = [1e-3, 1e-2]\n")
    command = ["sweep", url, "--store", store, "--model", f"{store}/target", "--no-plots"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    names = ["learning_rate=0.001", "learning_rate=0.01"]
    assert all(name in done.stdout for name in names)
    assert "written: runs/rates/compare.html" in done.stderr
    assert sorted(p.name for p in Path("runs/rates").iterdir()) == [".lock", "compare.html", *names]
    Path("runs/rates", names[0], "failed.json").write_text('{"step": 2, "reason": "it came to nothing"}')
    assert "1 of 2 heads failed; learning_rate=0.001: it came to nothing" in refused(
        CliRunner().invoke(main, command)
    )
