"""Which runs compare, in what they differ, and which is best.

Acceptance lengths compare on the held-out answers of one store, and at one number k of tokens drafted at
once. So runs are ranked store by store, at the most tokens that all of a store's runs draft.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import storage
from common.errors import EyasError
from common.texts import printable
from pipelines.compare.runs import Run
from train.names import AT_MOST, GREEDY_BY_K, SAMPLED_BY_K

_OF_HEADS = "head."  # begins the names of what a head is made of, which its kind has and others need not


@dataclass(frozen=True)
class Row:
    """A run among others. `differs` are the settings that are not the same in all of them, as text."""

    name: str
    run: Run
    differs: dict[str, str]


@dataclass(frozen=True)
class Group:
    """The runs of one store, best first; those without a figure at `k` tokens a draft come last, unranked.

    `same`: the settings that all share, as text.
    """

    store: str
    target: str
    k: int
    rows: list[Row]
    same: dict[str, str]

    @property
    def ranked(self) -> int:
        """How many rows have a figure to be ranked by."""
        return sum(math.isfinite(length(row.run, self.k)) for row in self.rows)

    @property
    def at_most(self) -> str:
        """What stands behind "sampled" where the store knows bounds alone; else ""."""
        heads = (row.run.last for row in self.rows)
        return ", at most" if any(head and head.values.get(AT_MOST) for head in heads) else ""


def length(run: Run, k: int, name: str = GREEDY_BY_K) -> float:
    """The walked acceptance length of the run's best head at drafts of `k` tokens; NaN if it has none."""
    return run.best.at(name, k - 1) if run.best else math.nan


def group(found: Sequence[Run], k: int | None = None) -> list[Group]:
    """The runs store by store, each ranked; the store with the most runs first.

    `k`: rank by drafts of so many tokens; EyasError if no run drafts as many.
    """
    most = max(one.steps_drafted for one in found)
    if k and 0 < most < k:
        raise EyasError(f"--k {k}: no run drafts so many tokens at once; name 1 to {most}")
    names = dict(zip((run.url for run in found), short_names([run.url for run in found]), strict=True))
    stores: dict[tuple[str, str], list[Run]] = {}
    for one in found:
        stores.setdefault((one.store, one.target["config_hash"]), []).append(one)
    groups = []
    for (store, _), members in stores.items():
        drafted = [one.steps_drafted for one in members if one.steps_drafted]
        at = k or min(drafted, default=1)
        members.sort(key=lambda one: _order(one, at, names[one.url]))
        differing = differences(members)
        rows = [Row(names[m.url], m, {n: _shown(m, n) for n in differing}) for m in members]
        same = {n: text(v) for n, v in members[0].settings.items() if n not in differing}
        groups.append(Group(store, printable(members[0].target["name"]), at, rows, same))
    return sorted(groups, key=lambda g: -len(g.rows))


def _order(run: Run, k: int, name: str) -> tuple[bool, float, float, str]:
    greedy, sampled = length(run, k), length(run, k, SAMPLED_BY_K)
    return math.isnan(greedy), -greedy, -sampled if math.isfinite(sampled) else 0.0, name


def differences(found: Sequence[Run]) -> list[str]:
    """The names of the settings that are not the same in all runs, in the order of experiment.json; what only
    some kinds of heads have, in those."""

    def differs(name: str) -> bool:
        of_heads = name.startswith(_OF_HEADS)
        its = [one.settings.get(name) for one in found if not of_heads or name in one.settings]
        return any(value != its[0] for value in its)

    differing = list(filter(differs, dict.fromkeys(name for one in found for name in one.settings)))
    if "head.draft_vocab_size" in differing:
        differing = [n for n in differing if n != "draft_ids_crc32"]  # other sizes are other ids
    return differing


def _shown(run: Run, name: str) -> str:
    absent = name.startswith(_OF_HEADS) and name not in run.settings
    return "-" if absent else text(run.settings.get(name))


def text(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "default"
    if isinstance(value, list):
        return ",".join(map(text, value))
    return printable(f"{value:g}" if isinstance(value, float) else str(value))


def short_names(urls: Sequence[str]) -> list[str]:
    """What tells the paths apart: each without the folders that all of them share."""
    paths = [url if storage.is_remote(url) else os.path.abspath(storage.local_path(url)) for url in urls]
    parts = [path.rstrip("/").split("/") for path in paths]
    shared, shortest = 0, min(map(len, parts)) - 1
    while shared < shortest and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [printable("/".join(p[shared:])) for p in parts]
