"""Runs beside each other, or one alone: compare, report."""

import shutil
import sys
from typing import Any

import click

from pipelines.verbs.shared import plots_option, show


@click.command()
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

    show_runs(stage.CompareConfig(runs, out, k, plots), as_json)


@click.command()
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
    show_runs(stage.CompareConfig((place,), out or f"{place}/report.html", plots=plots), as_json)


def show_runs(config: Any, as_json: bool) -> None:
    """Prints a comparison, a `CompareConfig`, and writes its page."""
    from common.progress import note
    from pipelines import compare as stage
    from pipelines.compare.tables import table, to_json

    found = stage.run(config)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    show(to_json(found)) if as_json else click.echo(table(found, width))
    note(f"written: {', '.join(found['written'])}")
