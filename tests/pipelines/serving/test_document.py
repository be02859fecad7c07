"""SERVING.md says what the code says, and its commands are of the recipes."""

import json
import shlex

import pytest

from pipelines import recipes
from pipelines.serving import document
from train import launch


def test_the_lists_of_the_document_are_those_of_the_code():
    with open(document.FILE, encoding="utf-8") as file:
        text = file.read()
    assert document.updated(text) == text, "run python -m pipelines.serving.document"


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_commands_that_name_its_target_and_its_head(name):
    recipe = recipes.load(name)
    text = document._of_recipe(recipe)
    blocks = text.split("```")[1].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in blocks if not line.startswith(("sh", "#"))]
    assert any(command for command in commands)
    model = ".cache/smollm2-135m" if recipe.model == recipes.EMBEDDED else recipe.model
    for command in filter(None, commands):
        assert model in command
        assert any(f"heads/{name}" in word for word in command)


def test_a_command_is_what_is_run_and_can_be_typed():
    head = launch.Served("a head", "portable", launch.Method({"method": "eagle3"}, "EAGLE3"))
    made = launch.command("vllm", "org/t", head, chips=4, environment={"A": "b c"})
    assert shlex.split(made.text().replace("\\\n", " ")) == ["A=b c", *made.arguments()]
    spec = json.loads(made.arguments()[-1])
    assert spec == {"method": "eagle3", "model": "a head", "num_speculative_tokens": launch.TOKENS}
    speculators = head._replace(layout="speculators")
    assert launch.command("vllm", "org/t", speculators).arguments() == ["vllm", "serve", "a head"]
    alone = launch.command("sglang", "org/t", None).arguments()
    assert alone == ["python", "-m", "sglang.launch_server", "--model-path", "org/t"]
    other = head._replace(method=launch.Method({"method": "eagle3", "parallel_drafting": True}, "OTHER"))
    assert json.loads(launch.command("vllm", "t", other).arguments()[-1])["parallel_drafting"] is True
    chain = launch.command("sglang-jax", "t", other, tokens=5).arguments()
    assert chain[chain.index("--speculative-num-draft-tokens") + 1] == "6"
    assert chain[chain.index("--speculative-algorithm") + 1] == "OTHER"
