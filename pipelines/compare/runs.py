"""Runs as training leaves them on disk, read for people to look at: finished, in progress, stopped, damaged.

What cannot be read is left out and becomes a note, one line that names it.

Dimensions: N lines, K steps of the rollout (tokens drafted), P points of a curve.
"""

import json
import math
import os
import posixpath
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from common import schema, storage
from common.errors import EyasError
from common.lock import in_use
from common.schema import Count, TypedDict
from common.texts import printable
from pipelines.compare.curves import Curve, thin
from train.heads import KINDS, settings_of
from train.names import (
    EVALUATION,
    EXPERIMENT,
    FAILED,
    FOLDERS,
    GREEDY_BY_K,
    LENGTH,
    METRICS,
    SAMPLED_BY_K,
    SINCE_BEST,
)

# What is plotted: names of training lines, and of evaluations. A name that ends in _k has K values a line.
TRAINED = ("loss", "acc_in_vocab_k", "gradient_norm", "learning_rate")
EVALUATED = (GREEDY_BY_K, SAMPLED_BY_K, "acc", "loss")
# Fields of the configuration that the identity holds as they were decided, or that are places.
_DECIDED = ("store", "out", "cache", "memory", "log_to", "epochs", "steps", "draft_vocab", "dtype")
_DECIDED += tuple(name for kind in KINDS for name in settings_of(kind))
_DEPTH = 4  # folders below the one that is named
_MOST_STEPS = 64  # a longer list in a line is damage,
_LARGEST = 2.0**128  # and so is a number beyond float32, of which no axis could be drawn


class _Target(TypedDict):
    name: str
    config_hash: str


class _Identity(TypedDict):
    config: dict[str, Any]
    store: str
    head: dict[str, Any]
    target: _Target
    steps: Count


class _Failed(TypedDict):
    step: Count
    reason: str


class _Call(TypedDict):
    config: dict[str, Any]
    versions: dict[str, str]


class _Experiment(TypedDict):
    identity: _Identity
    calls: Annotated[list[_Call], Field(min_length=1)]  # the last one's options hold


@dataclass(frozen=True)
class Evaluation:
    """A head on the held-out rows. `values`: the fields of train/metrics.py; `tokens` and `seconds` are those
    of the run when it was measured, NaN if that is not known."""

    step: int
    tokens: float
    seconds: float
    values: dict[str, Any]

    def number(self, name: str) -> float:
        """The number of that name, NaN if there is none."""
        found = self.values.get(name)
        return float(found) if _is_number(found) else math.nan

    def by_k(self, name: str) -> list[float]:
        """The K numbers of `name`; [] if it has none."""
        found = self.values.get(name)
        return found if _is_numbers(found) else []

    def at(self, name: str, k: int) -> float:
        """The number of `name` with index `k`, NaN if there is none."""
        found = self.by_k(name)
        return float(found[k]) if k < len(found) else math.nan


@dataclass(frozen=True)
class Run:
    """One folder of `train`. `settings` are all that could differ from another run, flat: {"head.ffn": 1536}.

    `store` is the store's hash, `store_url` where it was then.
    `state` is "done", "running", "stopped", "failed" (of a sweep, which says why) or, where that cannot be
    told, "unfinished". `best` is the
    evaluation of the head in best/, `last` the last one, None where there is none. `loss` is the last
    training loss.
    """

    url: str
    store: str
    store_url: str
    target: dict[str, Any]
    settings: dict[str, Any]
    planned: int
    step: int
    state: str
    tokens: float
    seconds: float
    loss: float
    best: Evaluation | None
    last: Evaluation | None
    trained: Curve
    evaluated: Curve
    notes: list[str] = field(default_factory=list)

    @property
    def steps_drafted(self) -> int:
        """K, as far as its evaluations tell; 0 without any."""
        return len(self.best.by_k(GREEDY_BY_K)) if self.best else 0

    @property
    def tokens_per_s(self) -> float:
        """Of the whole run: compiling, evaluations and checkpoints count."""
        return self.tokens / self.seconds if self.seconds > 0 else math.nan


def find(places: tuple[str, ...]) -> list[str]:
    """The runs that are named, or lie in a folder that is: folders with an experiment.json, each once.

    EyasError for a place without any.
    """
    found: dict[str, str] = {}
    for place in places:
        place = place.rstrip("/") or "/"
        here = _runs_in(place, _DEPTH)
        if not here:
            raise EyasError(
                f"{place} is no run and holds none: no {EXPERIMENT} there or below; name the folder that "
                "`eyas train --out` wrote, or one that holds several"
            )
        for url in here:
            found.setdefault(
                url if storage.is_remote(url) else os.path.realpath(storage.local_path(url)), url
            )
    return list(found.values())


def require_not_in_a_run(place: str) -> None:
    """EyasError for a place in what a run keeps for itself: what is written there would be taken for its."""
    path = place if storage.is_remote(place) else os.path.realpath(storage.local_path(place))
    folder, name = posixpath.split(path.rstrip("/"))
    while name and not folder.endswith(":"):
        if name in FOLDERS and storage.exists(f"{folder}/{EXPERIMENT}"):
            raise EyasError(f"{place} lies in {name}/ of a run, which training writes; name another place")
        folder, name = posixpath.split(folder)


def _runs_in(folder: str, depth: int) -> list[str]:
    names = storage.list_names(folder)
    if EXPERIMENT in names:
        return [folder]
    if not depth:
        return []
    inside = [f"{folder}/{name}" for name in names if not name.startswith(".")]
    if not storage.is_remote(folder):
        inside = [path for path in inside if os.path.isdir(storage.local_path(path))]
    return [url for path in inside for url in _runs_in(path, depth - 1)]


def read(url: str, points: int) -> Run:
    """The run in the folder `url`, its curves thinned to `points`. EyasError for a bad experiment.json."""
    experiment = schema.read(_Experiment, f"{url}/{EXPERIMENT}", "restore the file, or leave this run out")
    identity, call = experiment["identity"], experiment["calls"][-1]
    notes: list[str] = []
    lines, evaluations = _lines(f"{url}/{METRICS}", notes)
    columns = _columns(lines, TRAINED)
    steps = np.array([line["step"] for line in lines], np.float64)
    tokens = _column([line.get("tokens") for line in lines])[:, 0]
    seconds = _column([line.get("seconds") for line in lines])[:, 0]
    when = np.array([line["step"] for line in evaluations], np.float64)
    at = (when, *(_column([line.get(name) for line in evaluations])[:, 0] for name in ("tokens", "seconds")))
    measured = [line[EVALUATION] for line in evaluations]
    heads = [Evaluation(int(s), t, c, v) for s, t, c, v in zip(*at, measured, strict=True)]
    reached = int(max([0, *steps[-1:], *when[-1:]]))
    done = reached >= identity["steps"] or _gave_up(heads, call["config"])
    return Run(
        url=url,
        store=identity["store"],
        store_url=str(call["config"].get("store", "")),
        target=dict(identity["target"]),
        settings=_settings(identity, call),
        planned=identity["steps"],
        step=reached,
        state=_failure(url, notes) or _state(url, done),
        tokens=_last(tokens),
        seconds=_last(seconds),
        loss=_last(columns["loss"][:, 0]) if len(steps) else math.nan,
        best=_best(heads),
        last=heads[-1] if heads else None,
        trained=thin((steps, tokens, seconds), columns, points),
        evaluated=thin(at, _columns(measured, EVALUATED), points),
        notes=notes,
    )


def _best(heads: list[Evaluation]) -> Evaluation | None:
    """The one in best/: of the greatest walked greedy length, the first of equals."""
    known = [head for head in heads if math.isfinite(head.number(LENGTH))]
    return max(known, key=lambda head: head.number(LENGTH), default=None)


def _gave_up(heads: list[Evaluation], config: dict[str, Any]) -> bool:
    """Whether the run ended before its time, as `patience` says."""
    patience = config.get("patience")
    return type(patience) is int and bool(heads) and heads[-1].number(SINCE_BEST) >= patience


def _failure(url: str, notes: list[str]) -> str:
    """ "failed" if a sweep said so, which the notes then tell; else ""."""
    place = f"{url}/{FAILED}"
    if not storage.exists(place):
        return ""
    try:
        found = schema.read(_Failed, place, "delete it to try again")
    except EyasError as error:
        notes.append(str(error))
    else:
        notes.append(f"{url} failed at step {found['step']}: {found['reason']}")
    return "failed"


def _state(url: str, done: bool) -> str:
    if done:
        return "done"
    if storage.is_remote(url) and not url.startswith("gs://"):
        return "unfinished"
    return "running" if in_use(url) else "stopped"


def _settings(identity: _Identity, call: _Call) -> dict[str, Any]:
    pace = {name: value for name, value in call["config"].items() if name not in _DECIDED}
    rest = {name: value for name, value in identity.items() if name not in ("config", "store", "target")}
    return _flat(pace | identity["config"] | rest | {"versions": call["versions"]})


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in value.items():
        whole = f"{path}{printable(name)}"
        found |= _flat(part, f"{whole}.") if isinstance(part, dict) else {whole: part}
    return found


def _lines(url: str, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, evaluations) by ascending step; of anything else the notes say how much it is."""
    if not storage.exists(url):
        notes.append(f"{url} is missing: nothing has been logged yet")
        return [], []
    kinds: dict[str, list[dict[str, Any]]] = {"loss": [], EVALUATION: []}
    bad: list[int] = []
    lines = storage.read_bytes(url).splitlines(keepends=True)
    for number, text in enumerate(lines, 1):
        if number == len(lines) and not text.endswith(b"\n"):
            continue  # being written, or cut off by the end of the process
        line = _parsed(text)
        kind = next((name for name in kinds if line and name in line), None)
        if kind and line["step"] > (kinds[kind][-1]["step"] if kinds[kind] else -1):
            kinds[kind].append(line)
        else:
            bad.append(number)
    if bad:
        many = f"and {len(bad) - 1} more are" if len(bad) > 1 else "is"
        notes.append(f"{url}: line {bad[0]} {many} damaged or out of order, and left out")
    return kinds["loss"], kinds[EVALUATION]


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of metrics, None if it is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    good = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**53
    return line if good and isinstance(line.get(EVALUATION, {}), dict) else None


def _columns(lines: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{name: float64 [N, K]}, NaN where a line has no number."""
    return {name: _column([line.get(name) for line in lines]) for name in names}


def _column(values: list[Any]) -> np.ndarray:
    rows = [value if isinstance(value, list) else [value] for value in values]
    if not rows:
        return np.empty((0, 1))
    try:
        found = np.array(rows, np.float64).reshape(len(rows), -1)[:, :_MOST_STEPS]
    except (ValueError, TypeError, OverflowError):  # not all of them are numbers, or not as many
        found = np.full((len(rows), max(1, min(max(map(len, rows)), _MOST_STEPS))), math.nan)
        for n, row in enumerate(rows):
            known = [float(x) if _is_number(x) else math.nan for x in row[: found.shape[1]]]
            found[n, : len(known)] = known
    return np.where(np.abs(found) < _LARGEST, found, math.nan)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_STEPS and all(map(_is_number, value))


def _last(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else math.nan
