"""What prepare tells a person: the counts, what they mean, and warnings about rows and split."""

from collections import Counter
from typing import Any

import numpy as np

from common.progress import note
from dump.pack import advise_length

_FULL = 0.9  # of a row; below it a length that fills better is advised
# What a count means for the user, said once.
_EXPLAINED = {
    "dropped_tools": "conversations with tools are left out, since the target's chat template knows none",
    "turns_system_folded": "system turns stand in front of the first question, since the template knows none",
    "turns_cut_off": "answers were cut off: their text is learnt from, and not that they end there",
    "turns_reasoning_removed": "turns lose their reasoning: the template leaves it out, as a server does",
}


def nonzero(counts: Counter[str], prefix: str) -> list[tuple[str, int]]:
    """The counts with that prefix that are not 0."""
    return [(name, n) for name, n in counts.items() if n and name.startswith(prefix)]


def report(manifest: dict[str, Any], held_out: int, lengths: np.ndarray) -> None:
    """Prints what `manifest` says of the rows; `lengths`: the conversations' tokens before they were cut."""
    counts = Counter(manifest["counts"])
    note(f"conversations: {counts['read']:,} read, {counts['kept']:,} kept ({held_out:,} held out)")
    for prefix in ("dropped_", "turns_", "truncated", "lines_", "files_"):
        found = nonzero(counts, prefix)
        if found:
            note("  " + ", ".join(f"{name} {n:,}" for name, n in found))
    for name, meaning in _EXPLAINED.items():
        if counts[name]:
            note(f"{counts[name]:,} {meaning}")
    wanted = manifest["holdout"] * counts["kept"]
    if abs(held_out - wanted) > max(wanted / 2, 5):
        note(
            f"warning: {held_out / counts['kept']:.1%} of the conversations are held out, where "
            f"{manifest['holdout']:.1%} was asked for: the chunks of a chat stay together"
        )
    note(
        f"rows: {manifest['train_rows']:,} train + {manifest['test_rows']:,} test of {manifest['length']} "
        f"tokens, {manifest['fill']:.1%} full; {manifest['tokens']:,} tokens, {manifest['counted']:,} counted"
    )
    if manifest["fill"] < _FULL:
        length, share = advise_length(lengths, manifest["length"])
        better = f"--length {length} fills about {share:.0%}"
        advice = better if share > manifest["fill"] + 0.02 else "more conversations would fill them"
        note(
            f"warning: padding is computed like text, and rows are only {manifest['fill']:.0%} full; {advice}"
        )
