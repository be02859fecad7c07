"""Results as text that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.recipes import Recipe
from train.names import AT_MOST, GREEDY_BY_K, SAMPLED_BY_K


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of left-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def table(found: Mapping[str, Any]) -> str:
    """An evaluation: the head beside the n-gram predictors; by position, then walked as a server does."""
    head, steps = found["head"], len(found["head"]["acc"])
    others = [name for name in ("unigram", "bigram") if name in found]

    def numbers(label: str, values: Sequence[float]) -> list[str]:
        return [label, *(f"{value:.3f}" for value in values)]

    by_step = [["", *(f"step {k}" for k in range(steps))]]
    by_step += [numbers(f"head {name}", head[name]) for name in ("acc", "cond_acc", "full_acc", "alpha")]
    by_step += [numbers(f"{name} acc", found[name]["acc"]) for name in others]
    most = ", at most" if head.get(AT_MOST) else ""
    by_k = [["tokens drafted at once", *(f"k={k}" for k in range(1, steps + 1))]]
    by_k += [
        numbers("head, temperature 0", head[GREEDY_BY_K]),
        numbers(f"head, temperature 1, sampled drafts{most}", head[SAMPLED_BY_K]),
        numbers(f"  the same, of answers that the target drew{most}", head["length_drawn_by_k"]),
    ]
    by_k += [numbers(f"{name}, temperature 0", found[name][GREEDY_BY_K]) for name in others]
    accepted = ", ".join(f"{share:.3f}" for share in head["accepted_greedy"])
    return (
        f"by position, {head['counted']:,} answer positions\n{columns(by_step)}\n\n"
        f"estimated acceptance length: tokens a draft, every answer walked through as a server does\n"
        f"{columns(by_k)}\n"
        f"accepted at each position of {head['drafts']:,} drafts of {steps}, temperature 0: {accepted}\n"
        f"the answers are the target's own first choice at {head['own_text']:.1%} of the positions "
        "(100%: greedy answers, at temperature 0 an exact estimate; those at 1 want answers drawn there)\n"
        f"the draft vocabulary covers {head['coverage']:.1%} of the positions"
    )


def recipe_table(known: Sequence[Recipe], families: Sequence[str]) -> str:
    """The families, and the recipes with their sizes and slices."""
    rows = [["recipe", "layers", "hidden", "vocabulary", "dump", "train", "weights"]]
    for r in known:
        sizes = [str(r.layers), f"{r.hidden_size:,}", f"{r.vocab_size:,}"]
        rows.append([r.name, *sizes, r.dump_slice, r.train_slice, r.model])
    return "families (architectures in config.json):\n  " + "\n  ".join(families) + "\n\n" + columns(rows)
