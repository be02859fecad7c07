"""Runs side by side: what differs and what came out, as tables, a page and plots."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import storage
from common.errors import EyasError
from common.progress import Progress, note
from common.texts import install, printable
from pipelines.compare import page, runs
from pipelines.compare.ranking import Group, group
from pipelines.compare.runs import Run

_POINTS = 6000  # of all runs' curves together, and at most so many of one:
_MOST_POINTS = 1000


@dataclass(frozen=True)
class CompareConfig:
    """`runs`: folders that `train` wrote, or that hold such; `out`: the page, FILE.html, or None for none.

    `k`: rank by drafts of so many tokens, None: the most that all runs of a store draft. `plots`: also write
    FILE.png and FILE.svg, where matplotlib is installed.
    """

    runs: tuple[str, ...]
    out: str | None
    k: int | None = None
    plots: bool = True


def run(config: CompareConfig) -> dict[str, Any]:
    """{"groups", "notes", "written"}: `Group`s, what was left out and why, and the files that were written.

    EyasError if no run can be read or the page cannot be where it is wanted.
    """
    if config.out is not None:
        _require_place(config.out)
    urls = runs.find(config.runs)
    found, notes = _read(urls)
    groups = group(found, config.k)
    if len(groups) > 1:
        notes.insert(0, f"{len(groups)} stores: their held-out answers differ, so each is ranked by itself")
    notes += [text for one in groups if (text := _measured_otherwise(one))]
    written = _write(config, groups, notes) if config.out is not None else []
    return {"groups": groups, "notes": notes, "written": written}


def _measured_otherwise(group: Group) -> str:
    """Says that runs of a store were measured on more or fewer of its held-out answers than others."""
    counted = [row.run.best.number("counted") for row in group.rows if row.run.best]
    known = [int(count) for count in counted if math.isfinite(count)]
    if len(set(known)) < 2:
        return ""
    return (
        f"{min(known):,} to {max(known):,} held-out positions were measured, by the lengths of the runs: "
        "`eyas eval` measures all of a head's"
    )


def only_run(place: str) -> str:
    """The run that `place` is or holds. EyasError if it holds several."""
    found = runs.find((place,))
    if len(found) > 1:
        raise EyasError(f"{place} holds {len(found)} runs; name one of them, or use `eyas compare {place}`")
    return found[0]


def _read(urls: Sequence[str]) -> tuple[list[Run], list[str]]:
    points = min(_MOST_POINTS, _POINTS // len(urls))
    found, notes = [], []
    with Progress("read", len(urls), "run") as progress:
        for url in urls:
            try:
                found.append(runs.read(url, points))
                notes += [printable(text) for text in found[-1].notes]
            except EyasError as error:
                if url == urls[-1] and not found:
                    raise
                notes.append(printable(f"left out: {error}"))
            progress.update(1)
    return found, notes


def _require_place(out: str) -> None:
    """EyasError unless `out` is a page that may be written: never what a run keeps for itself."""
    if not out.endswith(".html"):
        raise EyasError(f"--out {out} must be a page, such as {out.rstrip('/')}.html")
    runs.require_not_in_a_run(out)
    if storage.is_remote(out):
        return
    if os.path.isdir(storage.local_path(out)):
        raise EyasError(f"--out {out} is a folder; name a file")
    storage.require_folder(os.path.dirname(storage.local_path(out)) or ".")


def _write(config: CompareConfig, groups: list[Group], notes: list[str]) -> list[str]:
    assert config.out is not None
    pages = {config.out: page.render(groups, notes).encode()}
    if config.plots:
        try:
            from pipelines.compare import plots
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            note(f"no PNG and SVG: they need matplotlib ({install('plot')}); the page does not")
        else:
            pages |= plots.draw(config.out.removesuffix(".html"), groups)
    for place, content in pages.items():
        storage.write_bytes(place, content)
    return list(pages)
