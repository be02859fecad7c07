"""The curves of a page as one PNG and one SVG, by matplotlib."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from common.texts import printable
from pipelines.compare.curves import Curve, means
from pipelines.compare.ranking import Group
from pipelines.compare.runs import Run
from pipelines.compare.tables import store_name
from train.names import GREEDY_BY_K, SAMPLED_BY_K

# Those of page.css on light paper.
PALETTE = ("#174674", "#e87417", "#00a2a2", "#8b2e46", "#a274ff", "#b98b5d", "#a20000", "#5d17a2")
_DASHES = ("-", "--", ":", "-.", (0, (4, 5)))
_DPI = 150
_NAME = 40  # characters of a run's name in the legend
_GROUPS = 8
_TOLD_APART = 16  # curves of a chart; of more, the first ones are in colours before the others in grey
_NAMED = 8  # of those
_OTHERS = "#c3c8ce"
_SHOWN = 100  # points of a curve, about
_STYLE = {
    "svg.hashsalt": "eyas",  # the same file for the same runs
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#d5dae0",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a $ in a run's name is a $
}


def draw(place: str, groups: Sequence[Group]) -> dict[str, bytes]:
    """{place.png, place.svg}: a row of charts for each figure of a group, against tokens and seconds.

    Of more than 8 groups the first ones, so that a picture is not too high to be drawn.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font lacks
        figure = _figure(groups[:_GROUPS])
        return {f"{place}.{kind}": _saved(figure, kind) for kind in ("png", "svg")}


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    dated = {"Date": None} if kind == "svg" else {}
    figure.savefig(file, format=kind, dpi=_DPI, bbox_inches="tight", metadata=dated)
    return file.getvalue()


def _figure(groups: Sequence[Group]) -> Figure:
    charts = [(group, chart) for group in groups for chart in _charts(group)]
    figure = Figure(figsize=(12, 2.9 * len(charts)), layout="constrained")
    legend: list[Artist] = []
    for (group, chart), pair in zip(charts, figure.subplots(len(charts), 2, squeeze=False), strict=True):
        for axis, against in zip(pair, ("tokens", "seconds"), strict=True):
            _draw(axis, group, chart, against)
        pair[0].set_title(chart.title, loc="left", fontsize=10, fontweight="bold")
        if chart.name == GREEDY_BY_K:
            legend += _legend(group, pair[0])
    figure.legend(handles=legend, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _legend(group: Group, axis: Axes) -> list[Artist]:
    """The lines of a group's first chart, which has them all, below the name of its store."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]  # without the stars
    return [Line2D([], [], linestyle="none", label=f"store {printable(group.store[:12])}"), *lines]


class _Chart(NamedTuple):
    """`kind` and `name` say where a run has the curve, `k` which of its K."""

    title: str
    kind: str
    name: str
    k: int


def _charts(group: Group) -> list[_Chart]:
    one, k = len(group.rows) == 1, group.k - 1
    where = f"\nstore {store_name(group)} of {group.target}"
    drafted, step = ("by k", "by step k") if one else (f"k = {group.k}", "step 0")
    sampled = f"{drafted}{group.at_most}"
    return [
        _Chart(f"Estimated acceptance length, temperature 0, {drafted}{where}", "evaluated", GREEDY_BY_K, k),
        _Chart(f"Estimated acceptance length, temperature 1, {sampled}", "evaluated", SAMPLED_BY_K, k),
        _Chart(f"Accuracy acc_k, held-out, {step}", "evaluated", "acc", 0),
        _Chart(f"Held-out loss, {step}", "evaluated", "loss", 0),
        _Chart("Training loss, sum over steps", "trained", "loss", 0),
    ]


def _draw(axis: Axes, group: Group, chart: _Chart, against: str) -> None:
    axis.set_xlabel(against)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    if len(group.rows) == 1:
        run = group.rows[0].run
        for k in range(getattr(run, chart.kind).mean[chart.name].shape[1]):
            _line(axis, run, chart._replace(k=k), against, k, f"k = {k + 1} (step {k})", 8)
        return
    rows, named = group.rows, _NAMED if len(group.rows) > _TOLD_APART else len(group.rows)
    for row in rows[named:]:
        _line(axis, row.run, chart, against, None, "", 0)
    for n, row in enumerate(rows[:named]):
        _line(axis, row.run, chart, against, n, _label(group, n), 13 if n == 0 else 7)
    if others := len(rows) - named:
        axis.plot([], [], color=_OTHERS, linewidth=0.8, label=f"{others} others, in the page by name")


def _line(axis: Axes, run: Run, chart: _Chart, against: str, n: int | None, label: str, star: float) -> None:
    """The n-th curve of a chart, None: one of the others, which has no star. One without values still has its
    line in the legend."""
    curve: Curve = getattr(run, chart.kind)
    values = curve.mean[chart.name]
    values = values[:, chart.k] if chart.k < values.shape[1] else np.full(len(values), math.nan)
    starts = np.arange(0, len(values), max(1, round(len(values) / _SHOWN)))
    x, y = (means(some[:, None], starts)[:, 0] for some in (getattr(curve, against), values))
    if n is None:
        axis.plot(x, y, color=_OTHERS, linewidth=0.8)
        return
    look = {"color": PALETTE[n % len(PALETTE)], "linestyle": _DASHES[n // len(PALETTE) % len(_DASHES)]}
    axis.plot(x, y, label=label, linewidth=1.2, zorder=3 - n / 100, **look)  # better ones over others
    if run.best and chart.name in (GREEDY_BY_K, SAMPLED_BY_K):
        at = getattr(run.best, against), run.best.at(chart.name, chart.k)
        axis.plot(*at, marker="*", markersize=star, color=look["color"])


def _label(group: Group, n: int) -> str:
    name = group.rows[n].name
    short = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    return f"{n + 1} {short}{' (best)' if n == 0 and group.ranked else ''}"
