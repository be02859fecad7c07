"""Curves of many lines, thinned to what a screen shows without hiding a spike.

Dimensions: N lines, K values of a name a line, P points.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """P points, each of a run of neighbouring lines: float64 [P] of `steps`, `tokens` and `seconds`, their
    means; {name: [P, K]} of `mean`, `low` and `high`. NaN where nothing is known. `thinned`: a point stands
    for more than one line somewhere."""

    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    mean: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]
    thinned: bool


def thin(at: tuple[np.ndarray, np.ndarray, np.ndarray], columns: dict[str, np.ndarray], points: int) -> Curve:
    """The curve of `columns`, {name: [N, K]}, at `at`: steps, tokens and seconds, [N] each.

    Up to `points` lines (3 at least) stay as they are. Of more, the first and the last line stay, and what
    lies between is divided evenly.
    """
    n = len(at[0])
    points = max(points, 3)
    starts = np.arange(n)
    if n > points:
        inner = 1 + np.arange(points - 2) * (n - 2) // (points - 2)
        starts = np.concatenate([[0], inner, [n - 1]])
    steps, tokens, seconds = (means(x[:, None], starts)[:, 0] for x in at)
    return Curve(
        steps,
        tokens,
        seconds,
        {name: means(x, starts) for name, x in columns.items()},
        {name: _reduce(np.fmin, x, starts) for name, x in columns.items()},
        {name: _reduce(np.fmax, x, starts) for name, x in columns.items()},
        n > points,
    )


def _reduce(function: np.ufunc, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return function.reduceat(values, starts, axis=0) if len(values) else values


def means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    total = _reduce(np.add, np.where(known, values, 0.0), starts)
    count = _reduce(np.add, known.astype(np.float64), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
