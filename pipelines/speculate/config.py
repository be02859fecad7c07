"""What can be chosen about measuring speculative decoding."""

from dataclasses import dataclass

from common.config import DEFAULT_DTYPE, DTYPES, check, given, setting


@dataclass(frozen=True)
class SpeculateConfig:
    """`model`: the target; `head`: a folder that a server loads."""

    model: str
    head: str
    store: str | None = setting(
        None, "A feature store: its held-out answers are given anew.", otherwise="only --prompts"
    )
    prompts: tuple[str, ...] | None = setting(
        None,
        "Questions: a file as --data takes it, of MT-Bench, Spec-Bench, SPEED-Bench, GSM8K, HumanEval, or of "
        "conversations; may be repeated. Each is a prompt set, with a figure a category.",
        otherwise="only --store",
    )
    each: int | None = setting(
        None,
        "Use the first so many questions of a category, and so many of the store's rows.",
        least=1,
        otherwise="all",
    )
    steps: int = setting(
        3, "Tokens drafted behind one another: k of a chain, the depth of a tree.", least=1, most=64
    )
    eagle_topk: int = setting(1, "Children of a node of EAGLE's tree; 1: a chain.", least=1, most=64)
    draft_tokens: int | None = setting(
        None,
        "Nodes of the tree, its root too, as SGLang counts them.",
        least=2,
        most=1024,
        otherwise="those of a chain",
    )
    sampled_drafts: bool = setting(
        False, "Draw the drafts of a chain from the head's distribution; they are its likeliest tokens else."
    )
    temperature: float = setting(0.0, "0 is greedy.", least=0)
    top_p: float | None = setting(
        None, "Sample from the likeliest tokens of this mass.", above=0, most=1, otherwise="all"
    )
    top_k: int | None = setting(None, "Sample from so many tokens.", least=1, otherwise="all")
    seed: int = setting(0, "Gives each answer its own seed.", least=0)
    max_tokens: int = setting(256, "Most tokens of an answer.", least=2)
    slots: int = setting(1, "Answers at once.", least=1, most=1024)
    length: int = setting(2048, "Tokens of a prompt and its answer; longer ones are left out.", least=2)
    dtype: str | None = setting(None, "What to compute in.", choices=DTYPES, otherwise=DEFAULT_DTYPE)
    plain: bool = setting(True, "Let the target also answer alone: for speed-up and equality.")
    out: str = setting("runs/speculate.json", "The file of figures to write.")

    def __post_init__(self) -> None:
        check(self)
        if not self.store and not self.prompts:
            raise ValueError("there is nothing to answer: give --store, --prompts or both")
        if self.eagle_topk > 1 and self.draft_tokens is None:
            some = min(4 * self.steps, _met(self.steps, self.eagle_topk)) + 1
            raise ValueError(
                f"eagle_topk={self.eagle_topk} drafts a tree: give --draft-tokens, such as {some}"
            )
        _require_shape(self.steps, self.eagle_topk, self.nodes, self.sampled_drafts)
        for name in given(self, ("sampled_drafts", "top_p", "top_k")) if not self.temperature else ():
            raise ValueError(f"{name} has no meaning at temperature 0, which is greedy; give --temperature")

    @property
    def nodes(self) -> int:
        """Of a draft, the root too."""
        return self.draft_tokens or self.steps + 1


def _require_shape(steps: int, topk: int, nodes: int, sampled: bool) -> None:
    """ValueError for a draft that cannot be."""
    met = _met(steps, topk)
    if not steps < nodes <= met + 1:
        wanted = f"{steps + 1} to {met + 1}" if met > steps else f"{steps + 1}"
        raise ValueError(
            f"draft_tokens={nodes} must be {wanted}: the root counts, and steps={steps} of "
            f"eagle_topk={topk} meet {met} others"
        )
    if sampled and topk > 1:
        raise ValueError(
            f"sampled drafts are for chains (eagle_topk=1); eagle_topk={topk} drafts the likeliest tokens"
        )


def _met(steps: int, topk: int) -> int:
    """How many nodes a head meets, the root not among them."""
    return topk + (steps - 1) * topk**2
