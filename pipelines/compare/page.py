"""One HTML page of runs side by side: it opens from disk, asks no network for anything, and is one file."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from pipelines.compare.curves import Curve
from pipelines.compare.ranking import Group, Row, length
from pipelines.compare.readable import duration, number, percent, tokens
from pipelines.compare.tables import by_k, cells, heading, kinds_by_k, title
from train.names import GREEDY_BY_K, SAMPLED_BY_K

COLOURS, DASHES = 8, 5  # of page.css
_FOLDER = resources.files("pipelines.compare") / "web"
_DIGITS = 5  # of a number in the page


def render(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """The page. Nothing of a run's name or settings is ever taken for markup or script."""
    style, script = _read("page.css"), "\n".join(map(_read, ("chart.js", "page.js")))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read("page.html"))
    return template.render(
        title=_title(groups),
        groups=[_shown(one) for one in groups],
        at_most=any(one.at_most for one in groups),
        single=len(groups) == 1 and len(groups[0].rows) == 1,
        notes=notes,
        style=style,
        script=script,
        hashes={"style": _hash(style), "script": _hash(script)},
        data=embedded({"groups": [_data(one) for one in groups]}),
        swatch=lambda n: f"c{n % COLOURS} d{n // COLOURS % DASHES}",
    )


def embedded(value: Any) -> str:
    """JSON that stays inside of its script element whatever its strings say."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # all ASCII
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy knows an inline part by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _title(groups: Sequence[Group]) -> str:
    if len(groups) == 1:
        return groups[0].rows[0].name if len(groups[0].rows) == 1 else f"{len(groups[0].rows)} runs"
    return f"{sum(len(one.rows) for one in groups)} runs on {len(groups)} stores"


def _shown(group: Group) -> dict[str, Any]:
    """What the template shows of a group."""
    tables = [(name, by_k(group.rows, figure, first)) for name, figure, first in kinds_by_k(group)]
    return {
        "title": title(group),
        "heading": heading(group),
        "lines": [_sortable(cells(group, n)) for n in range(len(group.rows))],
        "best": bool(group.ranked),
        "facts": _facts(group),
        "tables": [(name, lines) for name, lines in tables if lines],
        "same": group.same,
    }


def _sortable(line: Sequence[Any]) -> list[tuple[str, str, bool]]:
    """(text, what it is sorted by, whether that is a number)."""
    return [
        (cell.text, "" if cell.value != cell.value else str(cell.value), not isinstance(cell.value, str))
        for cell in line
    ]


def _facts(group: Group) -> list[tuple[str, str, str]]:
    """(what, value, how it came about) of the best run, to be seen first."""
    run = group.rows[0].run
    best, drafts = run.best, f"drafts of {group.k}"
    found = []
    if best and group.ranked:
        at = f"temperature 0, {drafts}; step {best.step:,} of {run.planned:,}"
        drawn = f"temperature 1, {drafts}{group.at_most}"
        found += [
            ("acceptance length", number(length(run, group.k)), at),
            ("the same, sampled", number(length(run, group.k, SAMPLED_BY_K)), drawn),
            ("first token right", percent(best.at("acc", 0)), "acc_0, held-out rows"),
        ]
        own = best.number("own_text")
        if math.isfinite(own):
            how = "of the answers: at 100% the length at temperature 0 is a server's own"
            found.append(("target's own text", percent(own), how))
    found += [
        ("trained on", f"{tokens(run.tokens)} tokens", f"{run.state}, step {run.step:,} of {run.planned:,}"),
        ("took", duration(run.seconds), f"{number(run.tokens_per_s, 3)} tokens/s, evaluations included"),
    ]
    return found


def _data(group: Group) -> dict[str, Any]:
    return {"title": title(group), "k": group.k, "runs": [_run_data(row, group.k) for row in group.rows]}


def _run_data(row: Row, k: int) -> dict[str, Any]:
    run = row.run
    best = run.best and {
        "at": _numbers([run.best.step, run.best.tokens, run.best.seconds]),
        "greedy": _numbers(run.best.by_k(GREEDY_BY_K)),
        "sampled": _numbers(run.best.by_k(SAMPLED_BY_K)),
    }
    return {
        "name": row.name,
        "about": ", ".join(f"{name} {value}" for name, value in row.differs.items()),
        "ranked": math.isfinite(length(run, k)),
        "best": best,
        "trained": _curve(run.trained),
        "evaluated": _curve(run.evaluated),
    }


def _curve(curve: Curve) -> dict[str, Any]:
    """x: [steps, tokens, seconds]; y: {name: [mean, low, high] of each k}, low and high where they differ."""
    x = [_numbers(values) for values in (curve.steps, curve.tokens, curve.seconds)]
    y: dict[str, list[list[list[float | None]]]] = {}
    for name, mean in curve.mean.items():
        parts = (mean, curve.low[name], curve.high[name]) if curve.thinned else (mean,)
        if np.isfinite(mean).any():
            y[name] = [[_numbers(part[:, k]) for part in parts] for k in range(mean.shape[1])]
    return {"x": x, "y": y}


def _numbers(values: Any) -> list[float | None]:
    """Rounded; null where nothing is known."""
    return [_rounded(float(x)) if math.isfinite(x) else None for x in values]


def _rounded(x: float) -> float | int:
    if x.is_integer() and abs(x) < 2**53:
        return int(x)
    x = float(f"{x:.{_DIGITS if abs(x) < 10**_DIGITS else _DIGITS + 3}g}")
    return int(x) if x.is_integer() else x
