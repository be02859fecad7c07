"""The whole way on the embedded model and conversations, on a small machine, with a summary for people."""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from common import storage
from common.config import digest
from common.progress import note
from common.store import Store
from pipelines import embedded, recipes

# Sized for 10 minutes on two cores, at 290 tokens/s in dump and 180 in train.
CONVERSATIONS = 100
HOLDOUT = 0.15
EPOCHS = 1.0
STAGES = ("fetch", "prepare", "dump", "train", "evaluate", "export")


@dataclass(frozen=True)
class DemoConfig:
    """`out` takes the results, `cache` the downloads."""

    out: str = "runs/demo"
    cache: str = ".cache"
    recipe: str = embedded.MODEL_NAME
    conversations: int = CONVERSATIONS
    holdout: float = HOLDOUT
    epochs: float = EPOCHS


class _Stages:
    """Titles and times the stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str):
        note(f"\n[{STAGES.index(name) + 1}/{len(STAGES)}] {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)


def run(config: DemoConfig) -> str:
    """Goes the whole way; writes OUT/summary.json and returns the same as text."""
    from dump import dump, prepare
    from pipelines.copy_head import copy_head
    from train import evaluate
    from train import run as train

    recipe, stages = recipes.load(config.recipe), _Stages()
    storage.require_folder(config.out)
    store, experiment, head = (os.path.join(config.out, name) for name in ("store", "train", "head"))
    with stages.stage("fetch"):
        model = recipes.folder(config.recipe, config.cache)
        data = embedded.fetch_conversations(config.cache)
    with stages.stage("prepare"):
        rows = prepare.run(
            prepare.PrepareConfig(
                (data,),
                model,
                store,
                **recipe.prepare | {"holdout": config.holdout, "max_conversations": config.conversations},
            )
        )
    with stages.stage("dump"):
        dumped = dump.run(dump.DumpConfig(model, store, **recipe.dump))
    with stages.stage("train"):
        trained = train.run(
            train.TrainConfig(store=store, out=experiment, **recipe.train | {"epochs": config.epochs})
        )
    with stages.stage("evaluate"):
        found = evaluate.run(evaluate.EvaluateConfig(os.path.join(experiment, "best"), store))
    with stages.stage("export"):
        opened = Store.open(store)
        checks = copy_head(os.path.join(experiment, "best"), opened, head)
    summary = {
        "target": embedded.NOTE,
        "target_config_hash": digest(opened.target_config()),
        "seconds": stages.seconds,
        "rows": {name: rows[name] for name in ("train_rows", "test_rows", "tokens", "counted", "fill")},
        "dump": dumped,
        "train": trained,
        "evaluation": found,
        "head": head,
        "checks": checks,
    }
    storage.write_json(os.path.join(config.out, "summary.json"), summary)
    return as_text(summary, config.out)


def as_text(summary: dict[str, Any], out: str) -> str:
    """The summary as a person reads it."""
    seconds, found, rows = summary["seconds"], summary["evaluation"], summary["rows"]
    head = found["head"]
    lines = [
        "",
        f"Target      {summary['target']}",
        f"Data        {rows['tokens']:,} tokens; {rows['train_rows']} train, {rows['test_rows']} test rows",
        f"Time        {sum(seconds.values()):.0f} s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()),
        f"Held out    first token right {head['acc'][0]:.1%} (bigram {found['bigram']['acc'][0]:.1%}, "
        f"unigram {found['unigram']['acc'][0]:.1%})",
        f"            estimated acceptance length, {len(head['acc'])} tokens a draft: "
        f"{head['length_greedy']:.2f} greedy, {head['length_sampled']:.2f} sampled (bigram "
        f"{found['bigram']['length_greedy']:.2f} greedy)",
        f"Head        {summary['head']}, checked; give it to a server beside its target",
        f"All figures {os.path.join(out, 'summary.json')}",
    ]
    return "\n".join(lines)
