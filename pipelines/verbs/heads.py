"""From a feature store to heads: train, sweep, eval, speculate, export."""

from typing import Any

import click

from common import pod
from common.errors import EyasError
from pipelines import recipes
from pipelines.options import options
from pipelines.speculate.config import SpeculateConfig
from pipelines.verbs.runs import show_runs
from pipelines.verbs.shared import RECIPES, configure, fetch, model_option, plots_option, show, store_option
from train.config import EvaluateConfig, TrainConfig
from train.servers import LAYOUTS, SERVERS


def recipe_of(model: str, store: str) -> recipes.Recipe | None:
    """The recipe that MODEL names, or that is for the target of the store's features."""
    from common.store import Store

    if recipe := recipes.named(model):
        return recipe
    return recipes.of_target(Store.open(store).target_config(), f"the target of {store}")


@click.command()
@model_option
@store_option
@click.option(
    "--out",
    required=True,
    help="The experiment's folder or gs:// prefix; best/ in it is what a server loads.",
)
@options(TrainConfig, RECIPES)
def train(model: str, store: str, out: str, **given: Any) -> None:
    """Trains a head from the store. --model names the recipe whose settings hold; the target's checkpoint is
    not needed. The same command continues a run; for other settings name another --out. On a pod the same
    command runs on every host.

    Example: eyas train --model qwen3-32b --store gs://bucket/qwen3-32b --out runs/lr2e-4 --learning-rate 2e-4
    """
    from pipelines.same_target import require_same_target
    from train import run as stage

    with pod.together():
        recipe = recipe_of(model, store)
        config = configure(TrainConfig, recipe, "train", given | {"store": store, "out": out})
        require_same_target(store, model)
    show(stage.run(config))


@click.command()
@click.argument("file", metavar="FILE.toml")
@model_option
@store_option
@click.option("--out", help="The folder or gs:// prefix of the runs (default: runs/FILE).")
@click.option(
    "--at-once",
    type=click.IntRange(1),
    help="Train so many heads at a time: less memory, and more readings of the store (default: all).",
)
@plots_option
def sweep(file: str, model: str, store: str, out: str | None, at_once: int | None, plots: bool) -> None:
    """Trains several heads from one stream of the store, as FILE.toml says, and compares them.

    The file has common [settings], [[experiments]] with a name and what differs, and a [grid] of lists whose
    combinations are experiments too; keys are the options of `eyas train` with _ for -. Each head comes out
    as `eyas train` would make it. The same command continues, and trains what was added to the file. On a pod
    the same command runs on every host.

    Example: eyas sweep rates.toml --store stores/qwen3-8b --model qwen3-8b
    """
    from pipelines import compare as comparison
    from pipelines import sweep as stage
    from pipelines.same_target import require_same_target
    from train import sweep as training

    place = out or stage.default_out(file)
    with pod.together():
        recipe = recipe_of(model, store)
        configs = stage.read(file, store, place, recipe.train if recipe else {})
        require_same_target(store, model)
    found = training.run(configs, place, at_once)
    with pod.together():
        if pod.is_first():
            show_runs(comparison.CompareConfig((place,), f"{place}/compare.html", plots=plots), False)
    if found["failed"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found["failed"].items())
        raise EyasError(f"{len(found['failed'])} of {len(configs)} heads failed; {reasons}")


@click.command("eval")
@click.option("--head", required=True, help="A head's folder, such as EXP/best.")
@store_option
@options(EvaluateConfig)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(head: str, store: str, as_json: bool, **given: Any) -> None:
    """Measures a head on the held-out rows, beside a unigram and a bigram predictor.

    Example: eyas eval --head runs/smollm2-135m/best --store stores/smollm2-135m
    """
    from pipelines.report import table
    from train import evaluate as stage

    found = stage.run(configure(EvaluateConfig, None, "", given | {"head": head, "store": store}))
    show(found) if as_json else click.echo(table(found))


@click.command()
@model_option
@click.option("--head", required=True, help="A head's folder, such as EXP/best.")
@options(SpeculateConfig)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_obj
def speculate(cache: str, model: str, head: str, as_json: bool, **given: Any) -> None:
    """Has target and head answer as a server would, beside the target alone: acceptance length by prompt set,
    category, position and context, speed-up, and whether the answers are the same.

    Example: eyas speculate --model Qwen/Qwen3-0.6B --head runs/qwen3-0.6b/best --prompts question.jsonl

    Example: eyas speculate --head runs/smollm2-135m/best --store stores/smollm2-135m --eagle-topk 8 --steps 5
    --draft-tokens 32
    """
    from pipelines.same_target import require_same_target
    from pipelines.speculate.run import run
    from pipelines.speculate.table import table

    config = configure(SpeculateConfig, None, "", given | {"model": model, "head": head})
    if config.store:
        require_same_target(config.store, model)
    found = run(fetch(config, cache))
    show(found) if as_json else click.echo(table(found))


@click.command()
@click.option("--head", required=True, help="A head's folder, such as EXP/best.")
@click.option("--store", required=True, help="The store it was trained from: names its target.")
@click.option("--out", required=True, help="The folder to write; made whole or not at all.")
@click.option(
    "--server",
    "servers",
    multiple=True,
    type=click.Choice(list(SERVERS)),
    help="Refuse a head that this server cannot take; may be repeated.",
)
@click.option(
    "--layout",
    type=click.Choice(list(LAYOUTS)),
    help="; ".join(f"{name}: {text}" for name, text in LAYOUTS.items()) + " (default: that of HEAD).",
)
@click.option("--target", help="The target's Hub id or folder, as servers find it; for --layout speculators.")
def export(
    head: str, store: str, out: str, servers: tuple[str, ...], layout: str | None, target: str | None
) -> None:
    """Writes a head as a folder that servers load, checks it against its target, and says what each server
    makes of it.

    Example: eyas export --head runs/smollm2-135m/best --store stores/smollm2-135m --out heads/smollm2-135m

    Example: eyas export --head runs/qwen3-8b/best --store stores/qwen3-8b --layout speculators
    --target Qwen/Qwen3-8B --out heads/qwen3-8b
    """
    from common.store import Store
    from pipelines.copy_head import copy_head

    for line in copy_head(head, Store.open(store), out, servers, layout, target):
        click.echo(line)
