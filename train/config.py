"""What can be chosen about training and evaluating a head."""

from dataclasses import dataclass
from typing import Any

from common import row_cache
from common.config import DEFAULT_DTYPE, DTYPES, check, require_with, setting
from train.heads import KINDS, require_apart, settings_of

STARTS = ("fitted", "target", "normal")
LOSSES = ("cross-entropy", "hard-labels", "forward-kl", "reverse-kl", "lk-alpha", "lk-lambda")
_TEMPERED = ("cross-entropy", "forward-kl", "reverse-kl")  # which a teacher's temperature changes as meant


def _cache() -> Any:
    """The setting of both stages."""
    text = "FOLDER:SIZE, such as /mnt/ssd:200GB: what is read of the store is kept there."
    return setting(None, text, otherwise="nothing is kept")


def _sp() -> Any:
    """The setting of both stages."""
    return setting(
        1, "Chips that share each row, if one is too long for one: --dp times --sp chips take part.", least=1
    )


def _check_batch(batch_rows: int, dp: int, accumulate: int = 1) -> None:
    if batch_rows % dp:
        raise ValueError(f"batch_rows={batch_rows} must be a multiple of dp={dp}")
    if batch_rows // dp % accumulate:
        raise ValueError(
            f"accumulate={accumulate} must divide the rows of a chip, batch_rows={batch_rows} over dp={dp}"
        )


@dataclass(frozen=True)
class TrainConfig(*KINDS.values()):
    """What to train. `store`: a complete feature store; `out`: the experiment's folder. What can be chosen
    about each kind of head is inherited."""

    store: str
    out: str
    seed: int = setting(0, "Seed of the initial head, and of noise.", least=0)
    data_seed: int = setting(0, "Seed of the order of rows.", least=0)
    share: float = setting(1.0, "Share of the train split's rows that is trained on.", above=0, most=1)
    epochs: float = setting(3.0, "Passes over that share of the train split.", above=0, most=1e6)
    steps: int | None = setting(
        None, "Optimiser steps; overrides --epochs.", least=1, otherwise="from --epochs"
    )
    batch_rows: int = setting(4, "Rows a step.", least=1)
    accumulate: int = setting(
        1, "Parts of a step's rows, computed one after the other: less memory, the same step.", least=1
    )
    noise: float = setting(
        0.0, "Standard deviation of noise on the aux states, as a share of each value.", least=0, most=1
    )
    ttt_steps: int = setting(7, "Steps K of the rollout.", least=1, most=64)
    anchors: float = setting(
        1.0,
        "Share of the counted positions, drawn anew at every step, that train steps 1 to K-1 of the rollout, "
        "or those that the kind says.",
        above=0,
        most=1,
    )
    decay: float = setting(0.8, "Step k's loss weighs decay^k.", above=0, most=2)
    loss: str = setting(
        "cross-entropy", "What the head's distribution loses against the target's.", choices=LOSSES
    )
    teacher_temperature: float = setting(1.0, "Divides the target's logits in the loss.", above=0)
    lk_scale: float = setting(1.0, "lk-lambda: weight of the cross entropy at acceptance 0.", least=0, most=1)
    lk_decay: float = setting(3.0, "lk-lambda: how fast that falls with acceptance.", least=0)
    draft_vocab: int | None = setting(
        None,
        "Size of the draft vocabulary.",
        least=1,
        otherwise="32000 for eagle3, or a smaller target's all; that of a head to begin with, or of stored "
        "draft logits",
    )
    optimizer: str = setting(
        "muon", "What moves the weights; muon takes the block's matrices.", choices=("adamw", "muon")
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate.",
        above=0,
        otherwise="4e-3 for muon, times 576 / hidden size for wider heads; 1e-4 for adamw",
    )
    warmup: float = setting(0.1, "Share of the steps that warms up.", least=0, below=1)
    schedule: str = setting(
        "cosine",
        "The rate after the warm-up; wsd: constant, and linear to 0 at the end.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    cooldown: float = setting(0.2, "wsd: share of the steps that falls to 0.", above=0, most=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay.", least=0)
    clip: float = setting(0.5, "Largest norm of the gradient.", above=0)
    ema: float = setting(
        0.0, "Decay of the average of the weights that is evaluated and exported; 0: none.", least=0, below=1
    )
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "How slowly AdamW forgets gradients and their squares.", least=0, below=1
    )
    init: str = setting(
        "fitted",
        "Start: a regression (fitted), the target's lm_head (target), noise (normal), or the folder of a "
        "head of any trainer, whose sizes and draft vocabulary are kept.",
    )
    compat: str | None = setting(
        None,
        "Reproduce another trainer's mask and divisor, to compare losses.",
        choices=("specforge",),
        otherwise="none",
    )
    dtype: str | None = setting(None, "What the head computes in.", choices=DTYPES, otherwise=DEFAULT_DTYPE)
    teacher: str | None = setting(
        None,
        "Logits from states, or stored ones.",
        choices=("recompute", "stored"),
        otherwise="from states where the store has last_hidden of every row",
    )
    eval_every: int | None = setting(
        None, "Steps between evaluations.", least=1, otherwise="chosen so that they cost little"
    )
    save_every: int | None = setting(
        None, "Steps between checkpoints.", least=1, otherwise="chosen so that they cost little"
    )
    patience: int | None = setting(
        None,
        "Evaluations in a row without a better acceptance length after which the run ends.",
        least=1,
        otherwise="all steps are done",
    )
    log_every: int = setting(10, "Steps between lines of metrics.jsonl.", least=1)
    log_to: tuple[str, ...] | None = setting(
        None,
        "Tell a tracker as well; may be repeated.",
        choices=("wandb", "tensorboard", "mlflow", "trackio"),
        otherwise="metrics.jsonl alone",
    )
    cache: str | None = _cache()
    memory: float = setting(4.0, "GiB of each host's memory for batches that are read ahead.", above=0)
    dp: int = setting(1, "Chips (or groups of them) that each take other rows of a batch.", least=1)
    sp: int = _sp()
    kind: str = setting("eagle3", "Kind of the head.", choices=tuple(KINDS))
    aux_layers: tuple[int, ...] | None = setting(
        None, "Which of the dumped aux layers the head reads: 2,16,29.", least=0, otherwise="all"
    )

    @property
    def init_folder(self) -> str | None:
        """The folder of the head that training begins with, None if that is a new one."""
        return None if self.init in STARTS else self.init

    def __post_init__(self) -> None:
        check(self)
        _check_batch(self.batch_rows, self.dp, self.accumulate)
        if self.cache:
            row_cache.parse(self.cache)
        if self.teacher_temperature != 1 and self.loss not in _TEMPERED:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature} does not go with loss={self.loss}; give 1, "
                f"or one of the losses {', '.join(_TEMPERED)}"
            )
        own = settings_of(self.kind)
        for kind in KINDS:
            for name in settings_of(kind):
                if name not in own:
                    require_with(self, name, "kind", kind)
        require_with(self, "cooldown", "schedule", "wsd")
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(
                f"warmup={self.warmup} and cooldown={self.cooldown} are more than all steps; give shares "
                "whose sum is at most 1"
            )
        require_with(self, "lk_scale", "loss", "lk-lambda")
        require_with(self, "lk_decay", "loss", "lk-lambda")


require_apart(KINDS, TrainConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate: `head`, a folder that a server loads, on the test rows of `store`."""

    head: str
    store: str
    ttt_steps: int = setting(7, "Tokens drafted at once, at most (K).", least=1, most=64)
    answer_tokens: int | None = setting(
        None, "Walk through so many tokens of each answer.", least=2, otherwise="all"
    )
    batch_rows: int = setting(4, "Rows of a forward pass.", least=1)
    ngrams: bool = setting(True, "Measure a unigram and a bigram predictor as well.")
    dtype: str | None = setting(None, "What to compute in.", choices=DTYPES, otherwise=DEFAULT_DTYPE)
    cache: str | None = _cache()
    dp: int = setting(1, "Chips (or groups of them) that each take other rows of a batch.", least=1)
    sp: int = _sp()

    def __post_init__(self) -> None:
        check(self)
        _check_batch(self.batch_rows, self.dp)
        if self.cache:
            row_cache.parse(self.cache)
