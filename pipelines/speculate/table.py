"""Figures of speculative decoding as text that a person reads."""

from typing import Any

from pipelines.report import columns
from train.names import AT_MOST


def table(found: dict[str, Any]) -> str:
    """Prompt sets and categories, then contexts, then the estimates of `eval`."""
    s = found["settings"]
    tree = f"tree: {s['steps']} steps, topk {s['eagle_topk']}"
    kind = tree if s["eagle_topk"] > 1 else f"chain of {s['steps']}"
    kind += f", {s['nodes']} tokens a draft with its root"
    drawn = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}"
    drawn += ", sampled drafts" if s["sampled_drafts"] else ""
    rows = [_header(s["steps"])]
    for name, of_set in found["sets"].items():
        rows.append([name, *_cells(of_set)])
        rows += [[f"  {category}", *_cells(figures)] for category, figures in of_set["categories"].items()]
    parts = [f"{kind}; {drawn}; {s['slots']} at once", columns(rows), _contexts(found["sets"])]
    return "\n\n".join([*parts, *_estimate(found)])


def _header(steps: int) -> list[str]:
    positions = [f"at {k}" for k in range(1, steps + 1)]
    return ["", "answers", "tokens", "length", *positions, "tokens/s", "alone", "speed-up", "identical"]


def _cells(figures: dict[str, Any]) -> list[str]:
    same = f"{figures['identical']} of {figures['compared']}" if figures["compared"] else "-"
    return [
        f"{figures['answers']:,}",
        f"{figures['tokens']:,}",
        _number(figures["acceptance_length"]),
        *map(_number, figures["accepted"]),
        *(_number(figures[name], 1) for name in ("tokens_per_s", "plain_tokens_per_s")),
        _number(figures["speedup"], 2),
        same,
    ]


def _number(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:,.{places}f}"


def _contexts(sets: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for of_set in sets.values() for name in of_set["by_context"]))
    rows = [["acceptance length by context", *names]]
    for name, of_set in sets.items():
        lengths = (of_set["by_context"].get(n, {}).get("acceptance_length") for n in names)
        rows.append([name, *map(_number, lengths)])
    return columns(rows)


def _estimate(found: dict[str, Any]) -> list[str]:
    """What the walk through the store says beside what was measured on the same answers."""
    if "estimate" not in found:
        return []
    s, estimate = found["settings"], found["estimate"]
    way = "greedy" if s["temperature"] == 0 else "sampled"
    most = "at most " if s["temperature"] and estimate.get(AT_MOST) else ""
    accepted = ", ".join(_number(share) for share in estimate[f"accepted_{way}"])
    length = _number(estimate[f"length_{way}"])
    own = f"; the text is the target's own choice at {estimate['own_text']:.1%}"
    if s["temperature"]:
        drawn = f"{most}{_number(estimate['length_drawn'])}"
        own = f"; {drawn} if the target drew the answers at temperature 1, which both want"
        own += f": its own first choice are {estimate['own_text']:.1%} of these (100%: greedy answers)"
    return [f"eval's estimate of a chain, {way}: length {most}{length}, accepted {most}{accepted}{own}"]
