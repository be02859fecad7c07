"""Whatever a file holds, a command ends soon, with its exit code and at most one line of an error.

Files that are almost right come from hypothesis, thousands of them; all the kinds of faults that they show
are told together.
"""

import json
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common import safetensors
from pipelines import recipes
from tests.fuzz import mutations
from tests.fuzz.world import TRAIN, World

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),  # the alarm is needed for each input
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PLACE = ["--model", "model", "--store", "store"]
DUMP = ["dump", *PLACE, "--block-rows", "4", "--precision", "int8"]
PREPARE = ["prepare", "--model", "model", "--store", "new", "--data", "chats.jsonl"]
PREPARE += ["--length", "128", "--holdout", "0.3"]
TRAINED = ["train", *PLACE, "--out", "run", *TRAIN]
EXPORT = ["export", "--head", "run/best", "--store", "store", "--out", "new"]
EVAL = ["eval", "--head", "run/best", "--store", "store", "--ttt-steps", "1", "--no-ngrams"]
VERIFY = ["verify", "--store", "store"]
CONFIG_FIELDS = (
    *("architectures", "rope_scaling", "rope_theta", "rope_parameters", "rms_norm_eps", "head_dim"),
    *("quantization_config", "partial_rotary_factor", "sliding_window", "layer_types", "num_local_experts"),
    *("auto_map", "hidden_act", "attention_bias", "mlp_bias", "dtype", "torch_dtype", "text_config"),
)
TOKENIZER_FIELDS = ("chat_template", "eos_token", "tokenizer_class", "added_tokens_decoder", "auto_map")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz") / "world")


def search(world: World, files: st.SearchStrategy, ways: list, examples: int) -> None:
    """Fails with every kind of problem that so many inputs (file, data) show; `ways`: (command, written)."""
    problems: dict[str, tuple] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(files, st.sampled_from(ways))
    def look(change, way):
        (file, data), (command, written) = change, way
        problem = world.problem(file, data, command, *written)
        if problem:
            problems.setdefault(problem.split(": ")[0], (problem, command[0], file, data[:400]))

    look()
    assert not problems, "\n".join(f"{p}\n    {c} with {f}: {d!r}" for p, c, f, d in problems.values())


def of_file(file: str, strategy: Callable, *more) -> st.SearchStrategy:
    return strategy(*more).map(lambda data: (file, data))


def json_file(world: World, file: str, names: tuple[str, ...] = ()) -> st.SearchStrategy:
    whole = json.loads((world.root / file).read_bytes())
    return of_file(file, mutations.documents, lambda: whole, names)


def binary_file(world: World, file: str, strategy: Callable = mutations.damaged) -> st.SearchStrategy:
    whole = (world.root / file).read_bytes()
    return of_file(file, strategy, lambda: whole)


def test_config_json(world):
    search(world, json_file(world, "model/config.json", CONFIG_FIELDS), [(DUMP, ["store"])], 600)


def test_safetensors_headers(world):
    weights = binary_file(world, "model/model.safetensors", mutations.safetensors)
    search(world, weights, [(DUMP, ["store"])], 300)


def test_an_index_of_shards(world):
    names = list(safetensors.Checkpoint.open(str(world.root / "model")).tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    path = world.root / "model/model.safetensors.index.json"
    path.write_text(json.dumps(index))
    try:
        search(world, json_file(world, "model/model.safetensors.index.json"), [(DUMP, ["store"])], 150)
    finally:
        path.unlink()


def test_tokenizer_files(world):
    settings_ = json_file(world, "model/tokenizer_config.json", TOKENIZER_FIELDS)
    tokenizer = json_file(world, "model/tokenizer.json")
    search(world, settings_ | tokenizer, [(PREPARE, ["new"])], 250)


TEMPLATES = [
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for a in range(10 ** 9) %}x{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 'x' * 10 ** 6 * 10 ** 6 }}",
    "{{ ('x' * 10 ** 5).replace('x', 'y' * 10 ** 5) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ raise_exception('no') }}",
    "{{ messages[99].role }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages.append(messages) }}{{ messages }}",
    "{% set x = namespace(l=[]) %}{% for i in range(99999) %}{% set x.l = [x.l] %}{% endfor %}{{ x.l }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ range(10 ** 10) | list | length }}",
    "{% if %}",
    "{{",
    "",
]


def test_chat_templates(world):
    raw = json.loads((world.root / "model/tokenizer_config.json").read_bytes())
    damaged = mutations.damaged(lambda: raw["chat_template"].encode())
    cut = damaged.map(lambda data: data.decode("utf-8", "replace"))

    def file(template):
        text = json.dumps(raw | {"chat_template": template})
        return ("model/tokenizer_config.json", text.encode())

    files = (st.sampled_from(TEMPLATES) | cut | mutations.json_values).map(file)
    search(world, files, [(PREPARE, ["new"])], 150)


def test_conversations(world):
    lines = (world.root / "chats.jsonl").read_bytes().splitlines()
    whole = [json.loads(line) for line in lines]
    first = mutations.documents(lambda: whole[0]).map(lambda data: data.replace(b"\n", b" "))
    of_lines = first.map(lambda data: b"\n".join([data, *lines[1:]]))
    bytes_ = mutations.damaged(lambda: b"\n".join(lines))
    files = of_lines | mutations.documents(lambda: whole) | bytes_
    search(world, files.map(lambda data: ("chats.jsonl", data)), [(PREPARE, ["new"])], 250)


def test_manifest_and_markers_of_a_store(world):
    marker = next((world.root / "store/commits").iterdir()).relative_to(world.root)
    files = json_file(world, "store/manifest.json") | json_file(world, str(marker))
    ways = [(VERIFY, []), (DUMP, ["store"]), (TRAINED, ["run"]), (EXPORT, ["new"])]
    search(world, files, ways, 450)


def test_what_the_store_keeps_of_the_target(world):
    target = world.root / "store/target"
    files = []
    for path in sorted(target.iterdir()):
        name = str(path.relative_to(world.root))
        files.append(binary_file(world, name))
        if path.suffix == ".json":
            files.append(json_file(world, name))
        if path.suffix == ".safetensors":
            files.append(binary_file(world, name, mutations.safetensors))
    files += [binary_file(world, "store/index.parquet")]
    ways = [(VERIFY, []), (DUMP, ["store"]), (TRAINED, ["run"]), (EXPORT, ["new"])]
    search(world, st.one_of(files), ways, 250)


def test_a_head(world):
    weights = binary_file(world, "run/best/model.safetensors", mutations.safetensors)
    files = json_file(world, "run/best/config.json") | weights
    converted = [*EXPORT, "--layout", "speculators", "--target", "org/target"]
    ways = [(EXPORT, ["new"])] * 3 + [(converted, ["new"])] * 3 + [(EVAL, [])]
    search(world, files, ways, 250)


def test_an_experiment(world):
    files = json_file(world, "run/experiment.json") | binary_file(world, "run/metrics.jsonl")
    search(world, files, [(TRAINED, ["run"])], 120)


def test_recipes(world, monkeypatch):
    folder = world.root / "recipes"
    folder.mkdir()
    whole = (recipes._FOLDER / "smollm2-135m.toml").read_text()
    (folder / "mine.toml").write_text(whole)
    monkeypatch.setattr(recipes, "_FOLDER", folder)
    numbers = ["-1", "0", "0.5", "nan", "inf", "1e400", "9" * 5000, "true", "1979-05-27"]
    odd = st.sampled_from([*numbers, '"a"', "''", "[]", "[[1]]", "{}", "{a = 1}"])
    lines = whole.splitlines()

    def other(at, value):
        name = lines[at].split("=")[0]
        return "\n".join([*lines[:at], f"{name}={value}", *lines[at + 1 :]]).encode()

    values = st.builds(other, st.integers(0, len(lines) - 1), odd)
    files = (values | mutations.damaged(whole.encode)).map(lambda data: ("recipes/mine.toml", data))
    ways = [(["targets"], []), (["train", "--model", "mine", "--store", "nothing", "--out", "new"], [])]
    search(world, files, ways, 200)
