"""Recipes are checked as they are read, and name only what their stages know."""

from dataclasses import fields

import pytest
from huggingface_hub import constants as of_hub

from common import storage
from common.errors import EyasError
from dump.config import DumpConfig, PrepareConfig
from dump.target.families import FAMILIES
from pipelines import recipes
from pipelines.bench.published import PUBLISHED
from tests.pipelines.hub import serve

GOOD = """
model = "owner/name"
architecture = "LlamaForCausalLM"
layers = 8
hidden_size = 64
vocab_size = 100
[dump]
slice = "v6e-4"
dp = 2
tp = 2
[train]
slice = "cpu"
"""


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_makes_the_configurations_of_its_stages(name):
    recipe = recipes.load(name)
    assert recipe.architecture in FAMILIES
    assert recipe.layers >= 7, "the default aux layers need 7"
    PrepareConfig(("data",), "model", "store", **recipe.prepare)
    config = DumpConfig("model", "store", **recipe.dump)
    config.batch(recipe.prepare["length"], min(4, config.dp * config.tp))
    assert (
        recipe.train["batch_rows" if "dp" in recipe.train else "draft_vocab"] % recipe.train.get("dp", 1) == 0
    )
    assert recipe.train["draft_vocab"] <= recipe.vocab_size
    assert {"optimizer", "learning_rate", "warmup"} <= recipe.train.keys(), "not what a default becomes"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (GOOD.replace("layers = 8", "layers = '8'"), "layers='8' must be a int"),
        (GOOD.replace("layers = 8", ""), "missing 1 required positional argument: 'layers'"),
        (GOOD.replace("tp = 2", "tp = 4"), r"\[dump\] dp\*tp=8 must be the number of chips of slice='v6e-4'"),
        (GOOD.replace("v6e-4", "h100"), "slice='h100' is unknown"),
        ("colour = 1\n" + GOOD, "recipe mine.toml: colour is unknown; known are name, model"),
        (GOOD + "layer = 2", r"recipe mine.toml, \[train\]: layer is unknown; did you mean layers"),
        (GOOD.replace("tp = 2", "t.p = 2"), r"recipe mine.toml, \[dump\]: t is unknown"),
        ("prepare.lenght = 8\n" + GOOD, r"\[prepare\]: lenght is unknown; did you mean length"),
        (GOOD + "[", "recipe mine.toml: "),
        (GOOD + "# \xe9", "recipe mine.toml: 'utf-8' codec can't decode"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_field_that_is_wrong(wrong, message):
    assert recipes.parse("mine", GOOD.encode()).dump == {"dp": 2, "tp": 2}
    with pytest.raises(EyasError, match=message) as refused:
        recipes.parse("mine", wrong.encode("latin-1"))
    assert "\n" not in str(refused.value)


def test_a_recipes_learning_rate_is_that_of_its_own_optimiser_alone():
    recipe = {"optimizer": "adamw", "learning_rate": 1e-4, "warmup": 0.1}
    assert recipes.beneath(recipe, {"warmup": 0.2}) == recipe | {"warmup": 0.2}
    assert recipes.beneath(recipe, {"optimizer": "adamw"}) == recipe
    assert recipes.beneath(recipe, {"optimizer": "muon"}) == {"optimizer": "muon", "warmup": 0.1}
    both = {"optimizer": "muon", "learning_rate": 2e-3}
    assert recipes.beneath(recipe, both) == recipe | both


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(EyasError, match=r"'smollm3' is no folder and no recipe.* or one of .*smollm2-135m"):
        recipes.named("smollm3")


def test_folders_urls_and_hub_ids_name_no_recipe(tmp_path):
    for model in (str(tmp_path), "gs://bucket/model", "owner/name"):
        assert recipes.named(model) is None
    assert recipes.folder(str(tmp_path), "cache") == str(tmp_path)
    assert recipes.folder("gs://bucket/model", "cache") == "gs://bucket/model"


def settings(recipe):
    return recipe.prepare, recipe.dump, recipe.train, recipe.dump_slice, recipe.train_slice


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_targets_config_tells_the_recipe(name):
    """Also of one that was trained further; of two recipes for the same sizes the settings are the same."""
    found = recipes.of_target(PUBLISHED[name] | {"_name_or_path": "mine", "eos_token_id": 3}, "mine")
    assert settings(found) == settings(recipes.load(name))


def test_a_config_of_other_sizes_or_weights_tells_no_recipe():
    config = PUBLISHED["llama-3.1-8b"]
    others = (
        {"num_hidden_layers": 31},
        {"hidden_size": "4096"},
        {"vocab_size": 128257},
        {"architectures": []},
    )
    for other in (
        *others,
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"vocab_size": 1}},
    ):
        assert recipes.of_target(config | other, "mine") is None
    assert recipes.of_target({"text_config": None, "architectures": "LlamaForCausalLM"}, "mine") is None


def test_a_model_has_one_recipe_in_a_folder_at_a_url_and_on_the_hub(tmp_path, monkeypatch, capsys):
    config = storage.json_bytes(PUBLISHED["llama-3.1-8b"])
    places = str(tmp_path / "model"), "memory://recipes/model"
    for place in places:
        storage.write_bytes(f"{place}/config.json", config)
    with serve("owner/model", {"config.json": config}) as hub:
        monkeypatch.setattr(of_hub, "ENDPOINT", hub.url)
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(of_hub, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        for model in (*places, "owner/model"):
            assert recipes.find(model, str(tmp_path)) == recipes.load("llama-3.1-8b")
            assert f"{model} has the sizes of the recipe llama-3.1-8b" in capsys.readouterr().err
    assert recipes.find(str(tmp_path), str(tmp_path)) is None, "which is no model at all"


@pytest.mark.parametrize(("name", "chips"), [("cpu", 1), ("v6e-16", 16), ("v5e-8", 8), ("v5p-32", 16)])
def test_a_slice_has_the_chips_of_its_cloud_name(name, chips):
    assert recipes.chips(name) == chips


def test_the_recipes_sections_are_those_of_the_stages():
    assert {f.name for f in fields(recipes.Recipe)} >= set(recipes.STAGES)
