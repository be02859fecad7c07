"""Eyas as a whole: demo, bench, targets."""

from typing import Any

import click

from pipelines import recipes
from pipelines.codecs.config import CodecsConfig
from pipelines.options import options
from pipelines.verbs.shared import configure, data_option, fetch, model_option, show


@click.command()
@click.option("--out", default="runs/demo", show_default=True, help="Where the demo's results go.")
@click.pass_obj
def demo(cache: str, out: str) -> None:
    """Goes the whole way on the embedded model and conversations, sized for 10 minutes on 2 cores."""
    from pipelines import demo as whole_way

    click.echo(whole_way.run(whole_way.DemoConfig(out=out, cache=cache)))


@click.command()
@click.option("--out", default="runs/bench.json", show_default=True, help="The file of figures to write.")
@click.pass_obj
def bench(cache: str, out: str) -> None:
    """Measures speed and memory of every stage in one run, beside what each is compared with."""
    from pipelines import bench as stage

    show(stage.run(out, cache))


@click.command("bench-codecs")
@data_option
@model_option
@click.option(
    "--out", default="runs/codecs", show_default=True, help="The folder of stores, heads and table.md."
)
@options(CodecsConfig)
@click.pass_obj
def bench_codecs(cache: str, data: tuple[str, ...], model: str, out: str, **given: Any) -> None:
    """Compares ways of storing: the acceptance that heads reach against the bytes a token.

    Example: eyas bench-codecs --data answers.jsonl --no-answer --conversations 2000 --epochs 3
    """
    from pipelines.codecs import compare as stage

    place = {"model": model, "data": data or (recipes.EMBEDDED,), "out": out}
    click.echo(stage.run(fetch(configure(CodecsConfig, None, "", given | place), cache)))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def targets(as_json: bool) -> None:
    """Lists the supported families and the recipes with their sizes and slices."""
    from dump.target.families import FAMILIES
    from pipelines.report import recipe_table

    known = [recipes.load(name) for name in recipes.names()]
    if as_json:
        return show({"families": sorted(FAMILIES), "recipes": [recipes.describe(r) for r in known]})
    click.echo(recipe_table(known, sorted(FAMILIES)))
