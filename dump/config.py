"""What can be chosen about preparing rows and dumping features."""

import math
import re
from dataclasses import dataclass

from common.config import CODECS, DEFAULT_DTYPE, DTYPES, PRECISIONS, check, require_with, setting
from common.divisors import largest_divisor


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare. `data`: files or URLs; `model`: a Hugging Face folder; `store`: where rows go."""

    data: tuple[str, ...]
    model: str
    store: str
    length: int = setting(2048, "Tokens a row.", least=8, most=2**24)
    holdout: float = setting(
        0.05, "Share of the conversations held out for evaluation; 0 holds none out.", least=0, below=1
    )
    seed: int = setting(0, "Shuffles and splits the conversations.", least=0)
    max_conversations: int | None = setting(
        None, "Stop reading after so many usable ones.", least=1, otherwise="all"
    )
    take: tuple[int, ...] | None = setting(
        None,
        "At most so many usable ones of each --data, in their order: 50000,2000.",
        least=1,
        otherwise="all",
    )
    mix: tuple[float, ...] | None = setting(
        None,
        "How many of each --data for how many of the others, in their order: 3,1; as many as there are.",
        above=0,
        otherwise="as they come",
    )

    def __post_init__(self) -> None:
        check(self)
        if not isinstance(self.data, tuple) or not all(isinstance(d, str) and d for d in self.data or [0]):
            raise ValueError(f"data={self.data!r} must be a tuple of at least one file")
        for name in ("take", "mix"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.data):
                raise ValueError(f"{name}={given!r} must be {len(self.data)} numbers, one for each --data")
        if self.mix and self.max_conversations and self.max_conversations < len(self.mix):
            raise ValueError(
                f"max_conversations={self.max_conversations} is less than one of each of the {len(self.mix)} "
                "--data that are mixed; give more, or leave some --data out"
            )


@dataclass(frozen=True)
class DumpConfig:
    """What to dump. `model` is a Hugging Face folder, `store` a store that prepare has made."""

    model: str
    store: str
    logits: str = setting("none", "Which logits to keep.", choices=CODECS)
    topk: int = setting(64, "The k of topk.", least=1)
    draft_vocab: int = setting(
        32_000, "Size of the vocabulary of --logits draft: the most frequent tokens learnt from.", least=1
    )
    last_hidden: str = setting(
        "all",
        "Of which rows the last hidden state is stored. With --logits topk it need not teach: first keeps as "
        "many rows as a fitted start needs.",
        choices=("all", "first", "none"),
    )
    precision: str = setting("int8", "What states are stored in.", choices=PRECISIONS)
    dtype: str | None = setting(None, "What the target computes in.", choices=DTYPES, otherwise=DEFAULT_DTYPE)
    aux_layers: tuple[int, ...] | None = setting(
        None,
        "Layers whose input the head reads: 2,16,29.",
        least=0,
        otherwise="2,n/2,n-3, as servers have it",
    )
    block_rows: int = setting(32, "Rows written and resumed as one.", least=1)
    batch_rows: int | None = setting(None, "Rows of a forward pass.", least=1, otherwise="by --chip-tokens")
    chip_tokens: int = setting(
        2048, "Tokens of a forward pass, for each chip, where --batch-rows does not say.", least=1
    )
    dp: int = setting(1, "Chips (or groups of them) that each take other rows of a batch.", least=1)
    tp: int = setting(1, "Chips that share each layer.", least=1)
    experts: str | None = setting(
        None, "Experts over tp: by columns or whole.", choices=("ffn", "expert"), otherwise="the family's"
    )
    dequantise: bool = setting(
        False, "Quantised weights become plain at load: faster, two to four times as large."
    )

    share: str = setting(
        "1/1", "I/N: only every N-th block, from the I-th on; for several slices on one store."
    )

    def __post_init__(self) -> None:
        check(self)
        self.part()
        require_with(self, "topk", "logits", "topk")
        require_with(self, "draft_vocab", "logits", "draft")
        if self.last_hidden != "all" and self.logits != "topk":
            raise ValueError(
                f"last_hidden={self.last_hidden} leaves logits={self.logits} without a teacher for "
                "evaluations; give logits=topk, or last_hidden=all"
            )

    def part(self) -> tuple[int, int]:
        """(I - 1, N) of `share`."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.share)
        part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= part <= parts:
            raise ValueError(f"share={self.share!r} must be I/N with I from 1 to N, 2/3 say")
        return part - 1, parts

    def batch(self, length: int, *own_chips: int) -> int:
        """Rows of a forward pass over rows of `length` tokens by processes with so many of the dp*tp chips
        each: the same number on every chip, and those of a process a part of a block."""
        chips = self.dp * self.tp
        if self.batch_rows is not None and self.batch_rows % chips:
            raise ValueError(f"batch_rows={self.batch_rows} must be a multiple of dp*tp={chips}")
        share = math.gcd(*(self.block_rows // own if self.block_rows % own == 0 else 1 for own in own_chips))
        rows = self.batch_rows or largest_divisor(share, max(1, self.chip_tokens // length)) * chips
        for own in own_chips:
            if self.block_rows % (rows // chips * own):
                raise ValueError(
                    f"block_rows={self.block_rows} must be a multiple of the {rows // chips * own} rows that "
                    f"a process with {own} of {chips} chips computes at a time (batch_rows={rows}); change "
                    "one of the two"
                )
        return rows
