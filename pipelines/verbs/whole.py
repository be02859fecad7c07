"""Eyas as a whole: demo, bench, targets."""

import click

from pipelines import recipes
from pipelines.verbs.shared import show


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
