"""What the READMEs and errors name is there: files behind links, targets of make, options of verbs."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from pipelines import recipes
from pipelines.cli import main
from train.heads import KINDS, settings_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "dump", "train", "pipelines")
READMES = [ROOT / "README.md", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("README.md"))]
READMES.append(ROOT / "pipelines/EXPERIMENTS.md")
OF_OTHERS = {
    "--worker",
    "--command",
    "--port",
    "--enable-auto-tool-choice",
    "--option",
    "--upgrade",
}  # gcloud, vLLM, "any", pip


def options() -> set[str]:
    commands = [main, *main.commands.values()]
    params = [p for command in commands for p in command.params if isinstance(p, click.Option)]
    return {name for p in params for name in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_targets_and_options_are_there(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    for target in re.findall(r"make ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`", text))):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) - OF_OTHERS
    assert named <= options(), named - options()


def test_what_can_be_chosen_about_a_head_is_told():
    text = (ROOT / "train/README.md").read_text(encoding="utf-8")
    names = {"--" + name.replace("_", "-") for kind in KINDS for name in settings_of(kind)}
    assert names
    assert not {name for name in names if not re.search(rf"{name}(?![\w-])", text)}


def advised(path: Path) -> set[str]:
    """The options that the errors of a file name."""
    raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    texts = [node.value for one in raised for node in ast.walk(one) if isinstance(node, ast.Constant)]
    return {name for text in map(str, texts) for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}


def test_options_that_errors_advise_are_there():
    found = {path: advised(path) for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    assert sum(map(len, found.values())) > 50
    known = options() | OF_OTHERS
    assert not {str(path): names - known for path, names in found.items() if names - known}


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_examples_of_the_help_are_commands(verb):
    """Options that are there, and targets that are recipes or have an owner or a folder."""
    paragraphs = map(str.strip, re.split(r"\n\s*\n", main.commands[verb].help))
    for example in (p.removeprefix("Example: eyas ") for p in paragraphs if p.startswith("Example: ")):
        words = shlex.split(example)
        assert words[0] == verb
        main.commands[verb].make_context(verb, words[1:])
        require_targets(example)


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_that_are_named_are_there(path):
    require_targets(path.read_text(encoding="utf-8"))


def require_targets(text: str) -> None:
    named = set(re.findall(r"(?:MODEL=|--model )([\w./-]+)", text))
    assert {name for name in named if "/" not in name} <= set(recipes.names())
