"""From conversations to a feature store: regenerate, prepare, dump, verify."""

from typing import Any

import click

from common import pod
from common.errors import EyasError
from dump.config import DumpConfig, PrepareConfig
from pipelines import recipes
from pipelines.options import options
from pipelines.regenerate.config import RegenerateConfig
from pipelines.verbs.shared import RECIPES, configure, data_option, fetch, model_option, show, store_option


@click.command()
@data_option
@click.option("--out", required=True, help="The .jsonl file of answers, for --data of prepare.")
@options(RegenerateConfig)
@click.pass_obj
def regenerate(cache: str, data: tuple[str, ...], **given: Any) -> None:
    """Keeps the user's turns of conversations and has the target answer them, through servers that run it or,
    if it is small, on this machine. Without --data, ShareGPT V3 is taken.

    Heads that learn from the target's own words have more drafts accepted. Tools are told to the server as
    they are defined; an answer that calls one ends its conversation.

    Example: eyas regenerate --data chats.jsonl --endpoint http://localhost:8000/v1 --served-model qwen3-8b
    --out answers.jsonl

    Example: eyas regenerate --data chats.jsonl --model smollm2-135m --out answers.jsonl
    """
    from pipelines.regenerate.local import require_small
    from pipelines.regenerate.run import run

    config = configure(RegenerateConfig, None, "", given | {"data": data or (recipes.EMBEDDED,)})
    if config.model:  # before its weights are fetched
        require_small(recipes.folder(config.model, cache, weights=False), config.length)
    show(run(fetch(config, cache)))


@click.command()
@data_option
@model_option
@store_option
@options(PrepareConfig, RECIPES)
@click.pass_obj
def prepare(cache: str, data: tuple[str, ...], model: str, store: str, **given: Any) -> None:
    """Turns conversations into packed rows of tokens; no device is touched. Without --data, ShareGPT
    V3 is taken.

    Example: eyas prepare --data chats.jsonl --model qwen3-8b --store stores/qwen3-8b --length 2048
    """
    from dump.prepare import run

    place = {"model": model, "data": data or (recipes.EMBEDDED,), "store": store}
    config = configure(PrepareConfig, recipes.find(model, cache), "prepare", given | place)
    show(run(fetch(config, cache))["counts"])


@click.command()
@data_option
@model_option
@store_option
@options(DumpConfig, RECIPES)
@click.pass_obj
def dump(cache: str, data: tuple[str, ...], model: str, store: str, **given: Any) -> None:
    """Runs the frozen target over the rows and writes the feature store.

    With --data, a store that has no rows yet is prepared from it first, as the recipe says. On a pod the same
    command runs on every host.

    Example: eyas dump --model qwen3-32b --store gs://bucket/qwen3-32b --data gs://bucket/chats.parquet
    """
    from common.manifest import read_manifest
    from common.progress import note
    from common.store import has_rows
    from dump import dump as stage
    from dump.prepare import run as prepare_rows

    recipe = recipes.find(model, cache)
    place = {"model": model, "store": store}
    config = configure(DumpConfig, recipe, "dump", given | place)
    rows = configure(PrepareConfig, recipe, "prepare", place | {"data": data}) if data else None

    def prepare_unless_prepared() -> None:
        if rows and has_rows(store):
            names = read_manifest(store)["rows"].get("config", {}).get("data", [])
            made = f" from {', '.join(names)}" if names else ""
            note(f"{store} has its rows already{made}: --data is not read; for other data name another store")
        elif rows:
            prepare_rows(fetch(rows, cache))

    pod.told(prepare_unless_prepared)  # the others wait
    show(stage.run(fetch(config, cache)))


@click.command()
@store_option
def verify(store: str) -> None:
    """Reads a whole store and compares every byte with its checksums.

    Exit code 2 if anything is damaged or missing.
    """
    from common import store_verify as stage

    found = stage.verify(store)
    show(found)
    if found["damaged"] or found["missing_blocks"]:
        raise EyasError(
            f"{store}: {len(found['damaged'])} parts damaged, {found['missing_blocks']} blocks missing; "
            "the same dump command writes what is missing"
        )
