"""The figures of bench-server as a person reads them."""

from typing import Any


def table(found: dict[str, Any]) -> str:
    """A line a level and server."""
    heads = ("tokens/s", "speed-up", "latency s", "first token s")
    widths = (9, 8, 15, 15)
    named = "  ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    lines = [f"{'in flight':>9}  {'head':<7}  {named}  accepted"]
    for level in found["levels"]:
        for side in ("with", "without"):
            if side in level:
                lines.append(_line(level, side))
    return "\n".join(
        [*lines, "latencies: median / 90th percentile; accepted: tokens a step, its own included"]
    )


def _line(level: dict[str, Any], side: str) -> str:
    its, length = level[side], level[side]["acceptance_length"]
    speed = f"{level['speed_up']:.2f}" if side == "with" and "speed_up" in level else ""
    return (
        f"{level['concurrency']:>9}  {side:<7}  {its['tokens_per_s']:>9.1f}  {speed:>8}  "
        f"{_pair(its, 'latency')}  {_pair(its, 'first_token')}  "
        + ("not told" if length is None else f"{length:.3f}")
    )


def _pair(its: dict[str, Any], name: str) -> str:
    return f"{its[f'{name}_median_s']:>6.2f} /{its[f'{name}_p90_s']:>7.2f}"
