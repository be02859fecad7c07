"""The command line: helps that tell the true defaults, exit codes, and one line for a user's mistake."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import MISSING, fields, replace
from pathlib import Path

import aiohttp
import click
import jax
import pytest
import requests
from click.testing import CliRunner

from common import storage
from common.config import knobs
from common.errors import EyasError, MachineError
from common.stopping import Stopped
from common.store import Store
from dump.config import DumpConfig, PrepareConfig
from pipelines import cli, recipes
from pipelines.regenerate import run as regenerate
from pipelines.regenerate.config import RegenerateConfig
from pipelines.same_target import require_same_target
from pipelines.speculate import run as speculate
from pipelines.speculate.config import SpeculateConfig
from pipelines.verbs import heads
from pipelines.verbs.shared import configure
from tests.dump import chats, tiny
from train import evaluate
from train.config import EvaluateConfig, TrainConfig

ROOT = Path(__file__).parents[2]
CHATS = str(ROOT / "tests" / "data" / "chats.jsonl")


def invoke(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args])


def refused(result, code=2):
    """The one line of an error."""
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.rstrip().endswith(line), "the error comes last, and on one line"
    assert "Traceback" not in result.output
    return line


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pipelines.cli", {"jax", "transformers", "tensorstore", "numpy"}),  # every --help
        ("pipelines.compare", {"jax", "transformers"}),  # which reads what training wrote
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("verb", sorted(cli.main.commands))
def test_every_verb_has_a_help_with_words_for_every_option(verb):
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    options = [o for o in cli.main.commands[verb].params if isinstance(o, click.Option)]
    assert all(option.help for option in options), "what is no option is told of in the text above"


CONFIGURATIONS = {
    "regenerate": RegenerateConfig,
    "prepare": PrepareConfig,
    "dump": DumpConfig,
    "train": TrainConfig,
    "eval": EvaluateConfig,
    "speculate": SpeculateConfig,
}


@pytest.mark.parametrize("verb", CONFIGURATIONS)
def test_every_field_of_a_configuration_is_an_option_or_a_required_place(verb):
    options = {o.name: o for o in cli.main.commands[verb].params}
    for field in fields(CONFIGURATIONS[verb]):
        option = options.pop(field.name)
        if field.default is MISSING:
            assert option.required or field.name in ("model", "data"), "these two have a default"
            continue
        assert option.default is None, "None is what is not given, so that a recipe's value can hold"
        assert "default: " in option.help
        assert field.type is not bool or option.secondary_opts, "a recipe may have set it"
    assert options.keys() <= {"model", "data", "as_json"}


def test_what_the_help_says_of_a_default_is_the_default():
    helps = {o.name: o.help for o in cli.main.commands["train"].params}
    assert helps["warmup"].endswith("(default: the recipe's, else 0.1)")
    assert helps["betas"].endswith("else 0.9,0.95)")
    assert helps["steps"].endswith("else from --epochs)")
    assert "(default: 7)" in {o.name: o.help for o in cli.main.commands["eval"].params}["ttt_steps"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --store s --out o --betas 0.9", "betas=(0.9,) must be 2 numbers"),
        (
            "train --store s --out o --betas 0.9,1",
            "betas=(0.9, 1.0) must be a number of at least 0 and",
        ),
        ("train --store s --out o --betas fast", "'fast' are not floats with commas between them"),
        ("train --store s --out o --learning-rate inf", "learning_rate=inf must be a number above 0"),
        ("train --store s --out o --epochs nan", "epochs=nan must be a number above 0"),
        ("train --store s --out o --warmup 1", "1.0 is not in the range 0<=x<1"),
        ("dump --store s --aux-layers=-1,2,3", "aux_layers=(-1, 2, 3) must be a whole number of at least 0"),
        ("regenerate --out o.jsonl", "nobody answers: give --endpoint and --served-model, or --model"),
        (
            "dump --store s --precision int4",
            "'int4' is not one of 'float32', 'bfloat16', 'float8_e4m3fn', 'int",
        ),
        ("dump --store s --last-hidden none", "last_hidden=none leaves logits=none without a teacher"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused(command, message):
    assert message in refused(invoke(*command.split()))


def test_what_is_given_wins_over_the_recipe_and_the_recipe_over_the_default():
    recipe = recipes.load("qwen3-32b")
    given = {"model": "m", "store": "s", "tp": 4, "topk": None}
    config = configure(DumpConfig, recipe, "dump", given)
    assert (config.tp, config.dp, config.topk) == (4, 16, 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder, a store with rows, and things that are wrong."""
    here = tmp_path_factory.mktemp("cli")
    model = tiny.write_model(str(here / "model"))
    tiny.write_store(str(here / "rows"), model)
    chats.write_model(here / "chat")
    tiny.write_model(str(here / "shallow"), layers=6)
    (here / "empty.jsonl").write_text("")
    (here / "broken.jsonl").write_text('{"id": 1,\n' * 20)
    (here / "no-answer.jsonl").write_text(
        '{"id": "a", "messages": [{"role": "user", "content": "Hello?"}]}\n'
    )
    (here / "no-config").mkdir()
    for name, change in {
        "unknown": {"architectures": ["MambaForCausalLM"]},
        "code": {"auto_map": {"AutoModel": "code.py"}},
    }.items():
        raw = storage.read_json(f"{model}/config.json")
        storage.write_json(str(here / name / "config.json"), raw | change)
    truncated = here / "truncated"
    tiny.write_model(str(truncated))
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[: len(data) // 2])
    outside = here / "outside"
    tiny.write_model(str(outside))
    os.remove(outside / "model.safetensors")
    storage.write_json(
        str(outside / "model.safetensors.index.json"), {"weight_map": {"a": "../x.safetensors"}}
    )
    manifest = storage.read_json(str(here / "rows" / "manifest.json"))
    storage.write_json(str(here / "newer" / "manifest.json"), manifest | {"schema": 99})
    storage.write_bytes(str(here / "damaged" / "manifest.json"), b'{"schema": 2, ')
    return here


PREPARE = "prepare --model chat --store new --data"
DUMP = "dump --store rows --model"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (f"{PREPARE} missing.jsonl", "missing.jsonl"),
        (f"{PREPARE} empty.jsonl", "empty.jsonl"),
        (f"{PREPARE} broken.jsonl", "broken.jsonl"),
        (f"{PREPARE} no-answer.jsonl", "answer to learn from"),
        ("prepare --model no-config --store new --data empty.jsonl", "config.json"),
        ("prepare --model smollm3 --store new", "no recipe"),
        (f"{DUMP} no-config", "config.json is missing"),
        (f"{DUMP} unknown", "LlamaForCausalLM"),
        (f"{DUMP} code", "auto_map"),
        (f"{DUMP} shallow", "layers"),
        (f"{DUMP} truncated", "model.safetensors"),
        (f"{DUMP} outside", "outside"),
        (f"{DUMP} model --tp 64 --block-rows 64", "devices"),
        (f"{DUMP} model --block-rows 32 --batch-rows 5", "batch_rows=5"),
        ("dump --store newer --model model", "schema"),
        ("dump --store damaged --model model", "manifest.json"),
        ("dump --store nothing --model model", "nothing"),
        ("verify --store damaged", "manifest.json"),
        ("export --head nowhere --store rows --out new", "run dump"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(place, monkeypatch, command, expected):
    monkeypatch.chdir(place)
    before = sorted(p for p in place.rglob("*"))
    assert expected in refused(invoke(*command.split()))
    assert sorted(p for p in place.rglob("*")) == before


@pytest.mark.parametrize("command", ["dump --model model", "dump --store s --topk 0", "fly"])
def test_wrong_usage_has_the_exit_code_of_a_mistake(command):
    assert invoke(*command.split()).exit_code == 2


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "store/x"), 1, "Error: store/x: the disk is full"),
        (
            OSError(errno.EFBIG, "File too large", "store/x"),
            1,
            "Error: store/x: the file is larger than may be",
        ),
        (EyasError("a\x1b[2Jb\r\nc"), 2, r"Error: a\x1b[2Jb c"),
        (PermissionError(errno.EACCES, "Permission denied", "store"), 1, "Error: store: permission denied"),
        (MachineError("store/x: the disk is full"), 1, "Error: store/x: the disk is full"),
        (
            socket.gaierror(-2, "Name or service not known"),
            42,
            "Error: a server: no answer from the server ([Errno -2] Name or service not known);",
        ),
        (
            aiohttp.ClientOSError("Cannot connect to bucket"),
            42,
            "Error: a server: no answer from the server (Cannot",
        ),
        (
            requests.exceptions.ProxyError("proxy"),
            42,
            "Error: a server: no answer from the server (proxy)",
        ),
        (KeyboardInterrupt(), 130, "Error: stopped; the same command goes on from what is kept"),
        (Stopped(signal.SIGTERM), 42, "Error: stopped; the same command goes on from what is kept"),
    ],
)
def test_what_the_machine_does_has_one_line_and_its_own_exit_code(monkeypatch, raised, code, text):
    def fail(name):
        raise raised

    monkeypatch.setattr(recipes, "load", fail)
    assert refused(invoke("targets"), code).startswith(text)


def test_what_fails_while_a_stage_is_stopped_has_an_exit_code_of_its_own(monkeypatch):
    """A state that cannot be saved: started again, the run would lose its steps for ever."""

    def fail(name):
        try:
            raise Stopped(signal.SIGTERM)
        except KeyboardInterrupt:
            raise MachineError("x/state: the disk is full") from None

    monkeypatch.setattr(recipes, "load", fail)
    assert refused(invoke("targets"), 1) == "Error: x/state: the disk is full"


def test_an_error_of_our_own_is_not_dressed_up_as_the_users(monkeypatch):
    monkeypatch.setattr(recipes, "names", lambda: 1 / 0)
    assert isinstance(invoke("targets").exception, ZeroDivisionError)


def test_ctrl_c_in_a_real_dump_exits_with_130_and_says_how_to_go_on(place, tmp_path):
    store = tiny.write_store(str(tmp_path / "store"), str(place / "model"), rows=4000)
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "dump",
        "--store",
        store,
        "--model",
        str(place / "model"),
    ]
    command += ["--block-rows", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    commits = Path(store, "commits")
    while process.poll() is None and not (commits.exists() and any(commits.iterdir())):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command" in err.splitlines()[-1]
    left = 1000 - len(list(commits.iterdir()))
    assert f"0 parts damaged, {left} blocks missing" in refused(invoke("verify", "--store", store))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_a_prepare_that_is_stopped_says_so_and_leaves_nothing(place, tmp_path, number, code):
    data = tmp_path / "chats.jsonl"
    data.write_bytes(Path(CHATS).read_bytes() * 20_000)
    command = [sys.executable, "-m", "pipelines", "prepare", "--model", str(place / "chat")]
    command += ["--store", str(tmp_path / "store"), "--data", str(data)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first = process.stderr.readline()
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code, first + rest
    assert rest.splitlines()[-1] == "Error: stopped; the same command goes on from what is kept"
    assert "Traceback" not in rest
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def dumped(place):
    store = tiny.write_store(str(place.parent / "dumped"), str(place / "model"))
    assert invoke("dump", "--store", store, "--model", place / "model").exit_code == 0
    return store


def test_a_flipped_bit_is_found(dumped, tmp_path):
    store = shutil.copytree(dumped, tmp_path / "store")
    chunk = max((store / "features" / "last_hidden").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 3] ^= 4
    chunk.write_bytes(data)
    assert "1 parts damaged, 0 blocks missing" in refused(invoke("verify", "--store", store))


def test_a_store_of_another_model_is_refused(dumped, place):
    other = tiny.write_model(str(place.parent / "other"), tied=True)
    assert "target" in refused(invoke("dump", "--store", dumped, "--model", other))
    with pytest.raises(EyasError, match="holds features of another model"):
        require_same_target(dumped, other)
    with pytest.raises(EyasError, match=r"another model \(model: layers 8\) than llama-3.1-8b \(layers 32\)"):
        require_same_target(dumped, "llama-3.1-8b")
    require_same_target(dumped, str(place / "model"))


def test_the_stores_target_tells_the_recipe_of_training_where_the_model_may_be_out_of_reach(
    dumped, monkeypatch
):
    target = Store.open(dumped).features["target"]
    sizes = {name: target[name] for name in ("architecture", "layers", "hidden_size", "vocab_size")}
    assert heads.recipe_of("gs://no-such-bucket/model", dumped) is None
    mine = replace(recipes.load("llama-3.1-8b"), name="mine", **sizes)
    monkeypatch.setattr(recipes, "names", lambda: ["mine"])
    monkeypatch.setattr(recipes, "load", {"mine": mine}.get)
    assert heads.recipe_of("gs://no-such-bucket/model", dumped) is mine


@pytest.mark.parametrize("verb", ["prepare", "dump", "train", "export", "regenerate", "compare", "verify"])
def test_a_name_that_is_not_utf_8_is_refused(verb, tmp_path):
    """As a JSON file, a message or TensorStore cannot have it."""
    assert r"a\udcffb' is not UTF-8; rename" in refused(invoke(verb, "--store", f"{tmp_path}/a\udcffb"))
    assert os.listdir(tmp_path) == []


def test_what_lies_at_a_name_that_is_not_utf_8_is_refused(place, tmp_path):
    here = tmp_path / "a\udcffb"
    here.mkdir()
    (here / "\udcff.jsonl").write_bytes(Path(CHATS).read_bytes())
    (tmp_path / "link").symlink_to(here)
    how = ("prepare", "--model", place / "chat", "--data")
    named = refused(invoke(*how, tmp_path / "link", "--store", tmp_path / "store"))
    assert r"\udcff.jsonl' is not UTF-8; rename it" in named
    assert "no arrays can be kept there" in refused(invoke(*how, CHATS, "--store", tmp_path / "link/x/../s"))
    assert os.listdir(here) == ["\udcff.jsonl"]
    assert sorted(os.listdir(tmp_path)) == ["a\udcffb", "link"]


def test_targets_are_listed_for_people_and_programs():
    found = json.loads(invoke("targets", "--json").stdout)
    assert "LlamaForCausalLM" in found["families"]
    assert {r["name"]: r["layers"] for r in found["recipes"]}["qwen3-32b"] == 64
    assert "qwen3-32b" in invoke("targets").stdout


@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("kind", [PrepareConfig, DumpConfig, TrainConfig, EvaluateConfig])
def test_whole_numbers_beyond_every_use_are_refused(kind, number):
    places = {"data": ("d",), "model": "m", "store": "s", "out": "o", "head": "h"}
    own = {name: value for name, value in places.items() if name in {f.name for f in fields(kind)}}
    for knob in (k for k in knobs(kind) if k.kind is int):
        with pytest.raises(ValueError, match=f"{knob.name}={number} must be a whole number"):
            kind(**own | {knob.name: number})


@pytest.mark.parametrize(
    ("stage", "first", "config", "advice"),
    [
        (evaluate, "Source", EvaluateConfig("head", "store"), "--batch-rows"),
        (speculate, "target", SpeculateConfig("model", "head", store="store"), "--slots"),
        (regenerate, "Local", RegenerateConfig(("chats.jsonl",), "out.jsonl", model="model"), "--slots"),
    ],
    ids=("eval", "speculate", "regenerate"),
)
def test_memory_of_the_chips_that_does_not_suffice_is_one_line_of_every_stage(
    stage, first, config, advice, monkeypatch
):
    """Wherever it is met; those of dump and train are tested where they are."""

    class Full:
        def __init__(self, *_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nmore")

        read_config = __init__

    monkeypatch.setattr(stage, first, Full if first != "target" else Full.__new__(Full))
    with pytest.raises(EyasError, match=f"^the memory of the chips does not suffice .*{advice}") as found:
        stage.run(config)
    assert "\n" not in str(found.value)
