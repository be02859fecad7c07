"""Speed and memory of every stage, measured in one run, each beside what it is compared with."""

import tempfile
from typing import Any

from common import storage
from common.progress import note
from pipelines import embedded


def run(out: str, cache: str) -> dict[str, Any]:
    """Measures everything; returns the figures, and writes those there are to the file `out` after each part.

    {name: {"value", "unit", "compared_with", "at_least" or "at_most" where there is a bar, "met"}}; what
    cannot be measured here has the value None and says "why".
    """
    from pipelines.bench import (
        chats,
        data,
        forward,
        gpu,
        memory,
        sweeping,
        tpu,
        tpu_training,
        training,
        writing,
    )

    storage.require_file(out)
    model, conversations = embedded.fetch_model(cache), embedded.fetch_conversations(cache)
    with tempfile.TemporaryDirectory(prefix="eyas-bench-") as place:
        parts = (
            lambda: data.prepared(model, conversations, place),
            lambda: data.dumped(model, conversations, place),
            lambda: data.shared(model, conversations, place),
            lambda: forward.peak_fraction(model),
            lambda: forward.attention_growth(model),
            lambda: data.streamed(place),
            lambda: sweeping.figures(f"{place}/streamed", data.STREAMED),
            lambda: writing.write_rate(place),
            lambda: writing.first_round(place),
            lambda: memory.figures(model, conversations, place),
            training.figures,
            lambda: data.stalled(place, f"{place}/dumped"),
            lambda: chats.figures(f"{place}/dumped", place),
            tpu.figures,
            tpu_training.figures,
            gpu.figures,
        )
        found: dict[str, Any] = {}
        for part in parts:
            found |= {name: _judged(name, figure) for name, figure in part().items()}
            storage.write_json(out, found)
    return found


def _judged(name: str, figure: dict[str, Any]) -> dict[str, Any]:
    """The figure, rounded, with whether it meets its bar."""
    if figure["value"] is None:
        note(f"bench: no {name}: {figure['why']}")
        return figure
    value = float(f"{figure['value']:.4g}")
    judged = figure | {"value": value}
    if "at_least" in figure or "at_most" in figure:
        judged["met"] = figure.get("at_least", 0) <= value <= figure.get("at_most", float("inf"))
        if not judged["met"]:
            note(f"bench: {name} is {value}, the bar is {figure.get('at_least', figure.get('at_most'))}")
    return judged
