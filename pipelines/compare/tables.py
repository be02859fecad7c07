"""Runs side by side as tables, for a terminal, for a page and as JSON."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from common.texts import printable
from pipelines.compare.ranking import Group, Row, text
from pipelines.compare.readable import duration, number, tokens
from pipelines.compare.runs import Evaluation
from pipelines.report import columns
from train.names import GREEDY_BY_K, SAMPLED_BY_K

_BY_K_SHOWN = 10  # runs whose figures by k the terminal shows
# Columns of `cells`, from the end, that a narrow terminal goes without: the last head's figures but for its
# length, the best one's accuracy and loss, tokens/s, training loss, tokens, step, time.
_LEFT_OUT = ((-8, -7, -6), (-12, -11), (-2,), (-5,), (-4,), (-10,), (-3,))


class Cell(NamedTuple):
    """What a person reads, and what a column is sorted by."""

    text: str
    value: float | str


def _cell(text: str, value: float | str | None = None) -> Cell:
    return Cell(text, text if value is None else value)


def heading(group: Group) -> list[str]:
    """The columns of `cells`."""
    figures = [f"sampled{group.at_most}", "acc_0", "loss_0"]
    best = [f"best, k={group.k}", *figures, "at step", f"last, k={group.k}", *figures]
    return ["", "run", *group.rows[0].differs, *best, "train loss", "tokens", "time", "tokens/s", "state"]


def cells(group: Group, n: int) -> list[Cell]:
    """Row `n`: the best head's figures, then the last one's, then the run's."""
    row, run = group.rows[n], group.rows[n].run
    marked = n == 0 and group.ranked and len(group.rows) > 1
    rank = f"({n + 1})" if n >= group.ranked else "1 best" if marked else str(n + 1)
    step = run.best.step if run.best else math.nan
    state = run.state if run.state == "done" else f"{run.state} at {run.step:,} of {run.planned:,}"
    return [
        _cell(rank, n),
        _cell(row.name),
        *(_cell(shown, _sorted_by(run.settings.get(name))) for name, shown in row.differs.items()),
        *_figures(run.best, group.k),
        _cell(f"{step:,}" if run.best else "-", step),
        *_figures(run.last, group.k),
        _cell(f"{run.loss:.3f}" if math.isfinite(run.loss) else "-", run.loss),
        _cell(tokens(run.tokens), run.tokens),
        _cell(duration(run.seconds), run.seconds),
        _cell(number(run.tokens_per_s, 3), run.tokens_per_s),
        _cell(state),
    ]


def _sorted_by(value: Any) -> float | str:
    return float(value) if isinstance(value, int | float) else text(value)


def _figures(head: Evaluation | None, k: int) -> list[Cell]:
    wanted = ((GREEDY_BY_K, k - 1), (SAMPLED_BY_K, k - 1), ("acc", 0), ("loss", 0))
    found = [head.at(*one) if head else math.nan for one in wanted]
    return [_cell(f"{value:.3f}" if math.isfinite(value) else "-", value) for value in found]


def kinds_by_k(group: Group) -> list[tuple[str, str, int]]:
    """(title, name, k of the first number) of what is shown by k."""
    drafted = "Estimated acceptance length by tokens drafted at once, temperature"
    return [
        (f"{drafted} 0", GREEDY_BY_K, 1),
        (f"{drafted} 1 with sampled drafts{group.at_most}", SAMPLED_BY_K, 1),
        ("Accuracy acc_k by step k of the draft, held-out rows", "acc", 0),
        ("Loss by step k of the draft, held-out rows", "loss", 0),
    ]


def by_k(rows: Sequence[Row], name: str, first: int) -> list[list[str]]:
    """A heading, then a line for each run's best and last head; [] if no run has `name`. `first`: k of the
    first number."""
    found = [(row.name, *head, head[1].by_k(name)) for row in rows for head in _heads(row)]
    found = [line for line in found if line[-1]]
    most = max((len(line[-1]) for line in found), default=0)
    lines = [["run", "head", "step", *(f"k={k}" for k in range(first, first + most))]] if found else []
    for run_name, label, head, values in found:
        shown = [f"{x:.3f}" for x in values] + ["-"] * (most - len(values))
        lines.append([run_name, label, f"{head.step:,}", *shown])
    return lines


def _heads(row: Row) -> list[tuple[str, Evaluation]]:
    """(a label, an evaluation) of the run's best and last head, once if they are the same."""
    best, last = row.run.best, row.run.last
    if best and last and best.step == last.step:
        return [("best and last", best)]
    return [(label, head) for label, head in (("best", best), ("last", last)) if head]


def table(found: dict[str, Any], width: int | None = None) -> str:
    """The groups as text: a line a run, best first and marked; then the first runs' figures by k.

    Lines of runs have `width` characters, where that can be reached without their names, settings and
    lengths; None: as many as they need.
    """
    groups = [_group_text(group, width) for group in found["groups"]]
    return "\n\n".join([*groups, *(f"note: {line}" for line in found["notes"])])


def title(group: Group) -> str:
    """What a group is, as a heading."""
    many = "1 run" if len(group.rows) == 1 else f"{len(group.rows)} runs"
    return f"{many} on store {store_name(group)} of {group.target}"


def store_name(group: Group) -> str:
    """Where a group's store was, and what tells it from others."""
    url, mark = (printable(text) for text in (group.rows[0].run.store_url, group.store[:12]))
    return f"{url} ({mark})" if url else mark


def _group_text(group: Group, width: int | None) -> str:
    lines = [heading(group), *([cell.text for cell in cells(group, n)] for n in range(len(group.rows)))]
    shown = _narrowed(lines, width)
    parts = [f"{title(group)}\n{columns(shown)}"]
    if left_out := len(lines[0]) - len(shown[0]):
        parts.append(f"({left_out} columns that have no room here are in the page)")
    for name, figure, first in kinds_by_k(group)[:-1]:
        if lines := by_k(group.rows[:_BY_K_SHOWN], figure, first):
            parts.append(f"{name}\n{columns(lines)}")
    if len(group.rows) > _BY_K_SHOWN:
        parts.append(f"(figures by k of the other {len(group.rows) - _BY_K_SHOWN} runs are in the page)")
    return "\n\n".join(parts)


def _narrowed(lines: list[list[str]], width: int | None) -> list[list[str]]:
    """The lines without as many columns as it takes to have them `width` characters long."""
    kept, shown = list(range(-len(lines[0]), 0)), lines
    for some in _LEFT_OUT:
        if width is None or max(map(len, columns(shown).splitlines())) <= width:
            break
        kept = [i for i in kept if i not in some]
        shown = [[line[i] for i in kept] for line in lines]
    return shown


def to_json(found: dict[str, Any]) -> dict[str, Any]:
    """What `compare.run` returns, as JSON; what is not known is null."""
    groups = [
        {"store": g.store, "target": g.target, "k": g.k, "runs": [_row(g, n) for n in range(len(g.rows))]}
        for g in found["groups"]
    ]
    return _finite({"groups": groups, "notes": found["notes"], "written": found["written"]})


def _row(group: Group, n: int) -> dict[str, Any]:
    row, run = group.rows[n], group.rows[n].run
    return {
        "rank": n + 1 if n < group.ranked else None,
        "name": row.name,
        "run": run.url,
        "state": run.state,
        "step": run.step,
        "steps": run.planned,
        "differs": {name: run.settings.get(name) for name in row.differs},
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_s": run.tokens_per_s,
        "train_loss": run.loss,
        "best": {**run.best.values, "step": run.best.step} if run.best else None,
        "last": {**run.last.values, "step": run.last.step} if run.last else None,
    }


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
