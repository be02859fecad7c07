"""What a store's bytes are worth: the acceptance that heads reach from it, for every way of storing.

All stores hold the same rows. Each trains heads of several seeds, and all heads are measured on the held-out
rows of one store, the standard: bfloat16 states. Whatever is done stays: the same call continues.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from common import storage
from common.config import FLOAT8, INT8
from common.errors import EyasError
from common.progress import note
from common.store import Store
from common.store_writer import raw_bytes
from dump import dump, prepare
from pipelines.codecs.config import CodecsConfig
from pipelines.regenerate.config import RegenerateConfig
from pipelines.regenerate.run import run as regenerate
from train import evaluate, sweep
from train.config import EvaluateConfig, TrainConfig
from train.source import Source

STANDARD = "bfloat16"
_KINDS = ("greedy", "sampled")


class Way(NamedTuple):
    """A way of storing: `topk` logits teach in place of the last state, which then the first rows alone have;
    0: it teaches."""

    precision: str
    topk: int = 0

    @property
    def name(self) -> str:
        """Of its store's folder."""
        return f"{self.precision}-topk{self.topk}" if self.topk else self.precision


@dataclass(frozen=True)
class Line:
    """A line of the table. `lengths`: {"greedy", "sampled": of every seed}."""

    way: Way
    bytes: float  # a token
    share: float  # of the standard's
    lengths: dict[str, list[float]]


def ways(topk: Sequence[int]) -> list[Way]:
    """What is compared; the standard is the first."""
    whole = [Way(STANDARD), Way(FLOAT8), Way(INT8)]
    return whole + [Way(STANDARD, max(topk))] + [Way(INT8, k) for k in topk]


def run(config: CodecsConfig) -> str:
    """Goes the whole way; writes OUT/figures.json and OUT/table.md, and returns the table.

    EyasError as the stages raise it, for more tokens than the target has, and for a head that comes to
    nothing.
    """
    storage.require_folder(config.out)
    _require_tokens(config)
    data = (_answers(config),) if config.answer else config.data
    compared = ways(config.topk)
    for way in compared:
        _store(config, way, data)
    for way in compared:
        _train(config, way)
    source = Source(_place(config, compared[0]))
    lines = [_line(config, way, source) for way in compared]
    about = _about(config, source.store)
    storage.write_json(
        f"{config.out}/figures.json", {"about": about, "lines": [asdict(one) for one in lines]}
    )
    text = "\n\n".join([about, table(lines)])
    storage.write_bytes(f"{config.out}/table.md", f"{text}\n".encode())
    return text


def _require_tokens(config: CodecsConfig) -> None:
    """EyasError before the first answer, and not only where the stage that takes the number begins."""
    words = prepare.read_vocab_size(config.model)
    for name, wanted in (("topk", max(config.topk)), ("draft_vocab", config.draft_vocab)):
        if wanted > words:
            raise EyasError(f"{name}={wanted}, but {config.model} has {words} tokens; give fewer")


def _answers(config: CodecsConfig) -> str:
    """The file of the target's own answers."""
    out = f"{config.out}/answers.jsonl"
    note(f"bench-codecs: {config.model} answers {config.conversations} conversations")
    regenerate(
        RegenerateConfig(
            config.data,
            out,
            model=config.model,
            max_conversations=config.conversations,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            truncated="keep",
            slots=config.slots,
            length=config.length,
        )
    )
    return out


def _place(config: CodecsConfig, way: Way) -> str:
    return f"{config.out}/stores/{way.name}"


def _store(config: CodecsConfig, way: Way, data: tuple[str, ...]) -> None:
    url = _place(config, way)
    note(f"bench-codecs: the store {way.name}")
    size = {"length": config.length, "holdout": config.holdout, "max_conversations": config.conversations}
    prepare.run(prepare.PrepareConfig(data, config.model, url, **size))  # which leaves the same rows alone
    how = {"precision": way.precision, "dtype": config.dtype}
    if way.topk:
        how |= {"logits": "topk", "topk": way.topk, "last_hidden": "first"}
    dump.run(dump.DumpConfig(config.model, url, **how))


def _names(config: CodecsConfig, way: Way) -> list[str]:
    return [f"{way.name}-{seed}" for seed in range(config.seeds)]


def _train(config: CodecsConfig, way: Way) -> None:
    out, heads = f"{config.out}/heads", {}
    for seed, name in enumerate(_names(config, way)):
        heads[name] = TrainConfig(
            _place(config, way),
            f"{out}/{name}",
            seed=seed,
            epochs=config.epochs,
            batch_rows=config.batch_rows,
            optimizer="adamw",
            learning_rate=config.learning_rate,
            draft_vocab=config.draft_vocab,
            ttt_steps=config.ttt_steps,
            teacher="stored" if way.topk else "recompute",  # a small store has the last state of all rows
            dtype=config.dtype,
            warmup=0.1,
            eval_every=2**31 - 1,  # at the end alone
        )
    failed = sweep.run(heads, out)["failed"]
    if failed:
        name, reason = next(iter(failed.items()))
        raise EyasError(f"{out}/{name} failed, so there is nothing to compare: {reason}")


def _line(config: CodecsConfig, way: Way, source: Source) -> Line:
    found = []
    for name in _names(config, way):
        head = f"{config.out}/heads/{name}/last"
        how = {"ttt_steps": config.ttt_steps, "batch_rows": config.batch_rows, "dtype": config.dtype}
        found.append(evaluate.estimate(source, EvaluateConfig(head, source.store.url, **how)))
    size = bytes_a_token(Store.open(_place(config, way)))
    standard = 8 * source.store.features["target"]["hidden_size"] + 16
    lengths = {kind: [one[f"length_{kind}"] for one in found] for kind in _KINDS}
    return Line(way, size, size / standard, lengths)


def bytes_a_token(store: Store) -> float:
    """What features take on disk for each token, padding included."""
    return raw_bytes(store.features["arrays"]) / (store.rows * store.length)


def _about(config: CodecsConfig, store: Store) -> str:
    rows = store.manifest["rows"]
    return (
        f"{store.features['target']['name']}: {rows['train_rows']} train rows of {store.length} tokens, "
        f"{config.epochs:g} epochs, {config.seeds} seeds; measured on {rows['test_rows']} held-out rows in "
        f"{STANDARD}, drafts of {config.ttt_steps} tokens."
    )


def table(lines: Sequence[Line]) -> str:
    """Markdown, the standard first: bytes against acceptance length, mean ± standard deviation over seeds,
    and the change of greedy length against the standard's heads of the same seeds."""
    titles = ("states", "teacher", "bytes a token", "of 8H + 16", "greedy", "sampled", "change")
    rows = [titles, ["---"] * len(titles)]
    for one in lines:
        pairs = zip(one.lengths["greedy"], lines[0].lengths["greedy"], strict=True)
        change = [found / standard - 1 for found, standard in pairs]
        rows.append(
            (
                one.way.precision,
                f"{one.way.topk} logits" if one.way.topk else "last state",
                f"{one.bytes:,.0f}",
                f"{one.share:.1%}",
                *(_with_spread(one.lengths[kind], "{:.3f}") for kind in _KINDS),
                "" if one is lines[0] else _with_spread(change, "{:+.1%}"),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _with_spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}"
