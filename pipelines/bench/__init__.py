"""Speed and memory of every stage, measured in one run, each beside what it is compared with."""

import tempfile
from typing import Any

from common import files
from common.progress import note
from pipelines import embedded


def run(out: str, cache: str) -> dict[str, Any]:
    """Measures everything, writes the figures to the file `out` and returns them.

    {name: {"value", "unit", "compared_with", "at_least" or "at_most" where there is a bar, "met"}}.
    """
    from pipelines.bench import data, training

    model, conversations = embedded.fetch_model(cache), embedded.fetch_conversations(cache)
    with tempfile.TemporaryDirectory(prefix="eyas-bench-") as place:
        found = data.prepared(model, conversations, place)
        found |= data.dumped(model, conversations, place)
        found |= data.streamed(place)
        found |= training.figures()
        found |= data.stalled(place, f"{place}/dumped")
    for name, figure in found.items():
        figure["value"] = float(f"{figure['value']:.4g}")
        if "at_least" in figure or "at_most" in figure:
            figure["met"] = (
                figure.get("at_least", 0) <= figure["value"] <= figure.get("at_most", float("inf"))
            )
            if not figure["met"]:
                bar = figure.get("at_least", figure.get("at_most"))
                note(f"bench: {name} is {figure['value']}, the bar is {bar}")
    files.write_json(out, found)
    return found
