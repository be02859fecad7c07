"""Results as text that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.recipes import Recipe


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of left-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def table(found: Mapping[str, Any]) -> str:
    """An evaluation: the head beside the n-gram predictors, by TTT step."""
    head, steps = found["head"], len(found["head"]["acc"])
    rows = [["", *(f"step {k}" for k in range(steps))]]
    for name in ("acc", "cond_acc", "full_acc", "alpha"):
        rows.append([f"head {name}", *(f"{value:.3f}" for value in head[name])])
    for name in ("unigram", "bigram"):
        if name in found:
            rows.append([f"{name} acc", *(f"{value:.3f}" for value in found[name]["acc"])])
    lines = [f"head: {head['length_greedy']:.3f} greedy, {head['length_sampled']:.3f} sampled"]
    lines += [f"{n}: {found[n]['length_greedy']:.3f} greedy" for n in ("unigram", "bigram") if n in found]
    return (
        f"{columns(rows)}\n\nestimated acceptance length, tokens a step\n  "
        + "\n  ".join(lines)
        + f"\ndraft vocabulary covers {head['coverage']:.1%} of {head['counted']:,} counted positions"
    )


def recipe_table(known: Sequence[Recipe], families: Sequence[str]) -> str:
    """The families, and the recipes with their sizes and slices."""
    rows = [["recipe", "layers", "hidden", "vocabulary", "dump", "train", "weights"]]
    for r in known:
        sizes = [str(r.layers), f"{r.hidden_size:,}", f"{r.vocab_size:,}"]
        rows.append([r.name, *sizes, r.dump_slice, r.train_slice, r.model])
    return "families (architectures in config.json):\n  " + "\n  ".join(families) + "\n\n" + columns(rows)
