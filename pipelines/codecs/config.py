"""What can be chosen about the comparison of codecs."""

from dataclasses import dataclass

from common.config import DEFAULT_DTYPE, DTYPES, check, require_with, setting


@dataclass(frozen=True)
class CodecsConfig:
    """`model`: the target; `data`: conversations; `out`: the folder of answers, stores, heads and table."""

    model: str
    data: tuple[str, ...]
    out: str
    answer: bool = setting(True, "Have the target answer the conversations first, unless it has already.")
    conversations: int = setting(400, "Conversations that are used, at most.", least=2)
    max_tokens: int = setting(256, "Most tokens of an answer that is made here.", least=1)
    temperature: float = setting(1.0, "At which the target answers; 0 is greedy.", least=0)
    slots: int = setting(16, "Conversations that are answered here at once.", least=1, most=1024)
    length: int = setting(512, "Tokens a row, and of a conversation that is answered here.", least=8)
    holdout: float = setting(0.2, "Share of the conversations that heads are measured on.", above=0, below=1)
    epochs: float = setting(3.0, "Passes over the others.", above=0)
    seeds: int = setting(3, "Heads for each line of the table.", least=1, most=100)
    batch_rows: int = setting(4, "Rows a step.", least=1)
    learning_rate: float = setting(4e-4, "Peak learning rate.", above=0)
    draft_vocab: int = setting(8192, "Size of the draft vocabulary.", least=1)
    ttt_steps: int = setting(7, "Steps of the rollout, and tokens a draft.", least=1, most=64)
    topk: tuple[int, ...] = setting((8, 16, 64, 256), "How many of the largest logits teach.", least=1)
    dtype: str | None = setting(None, "What is computed in.", choices=DTYPES, otherwise=DEFAULT_DTYPE)

    def __post_init__(self) -> None:
        check(self)
        for name in ("max_tokens", "temperature", "slots"):
            require_with(self, name, "answer", True)
