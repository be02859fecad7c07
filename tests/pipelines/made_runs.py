"""Folders of runs that nobody trained: the files and fields of `train`, with curves by a formula."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import compare
from pipelines.compare import CompareConfig

STORE = "3f2a9c1d" * 8


def write_run(
    folder: Path,
    *,
    rate: float = 1e-4,
    seed: int = 0,
    K: int = 7,
    steps: int = 400,
    reached: int | None = None,
    log_every: int = 2,
    eval_every: int | None = 20,
    quality: float = 1.0,
    store: str = STORE,
    target: str = "made-up",
    head: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A run of `steps` steps, `reached` of which are done; `quality` says how much its head learns; `head` is
    what it is made of."""
    folder.mkdir(parents=True)
    settings = {"seed": seed, "batch_rows": 4, "ttt_steps": K, "decay": 0.8, "learning_rate": rate}
    settings |= {"betas": [0.9, 0.95], "init": "fitted", "compat": None} | config
    identity = {
        "config": settings,
        "store": store,
        "head": head
        or {"hidden_size": 576, "ffn": 1536, "draft_vocab_size": 8192, "aux_layers": [2, 15, 27]},
        "draft_ids_crc32": 1664494875,
        "target": {
            "name": target,
            "architecture": "LlamaForCausalLM",
            "config_hash": (target[::-1] * 64)[:64],
        },
        "steps": steps,
        "dtype": "float32",
    }
    whole = settings | {
        "store": "stores/x",
        "out": str(folder),
        "steps": None,
        "epochs": 3.0,
        "log_every": log_every,
    }
    call = {"config": whole, "versions": {"eyas": "0.1.0", "jax": "0.10.2"}}
    experiment = {"identity": identity, "calls": [call]}
    (folder / "experiment.json").write_text(json.dumps(experiment))
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, (steps if reached is None else reached) + 1):
        done = (step / steps) ** 0.5 * quality
        if step % log_every == 0 or step in (1, steps):
            lines.append(_training(rng, step, done, K, rate, steps))
        if eval_every and (step % eval_every == 0 or step == steps):
            lines.append(_when(step) | {"evaluation": _evaluation(rng, step, done, K)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _training(rng, step: int, done: float, K: int, rate: float, steps: int) -> dict[str, Any]:
    loss = [2 + 5 * math.exp(-4 * done) + 0.12 * k + float(rng.normal(0, 0.12)) for k in range(K)]
    return {
        **_when(step),
        "loss": sum(0.8**k * x for k, x in enumerate(loss)),
        "loss_k": loss,
        "acc_in_vocab_k": [min(1.0, 0.6 * done * 0.93**k + float(rng.normal(0.05, 0.02))) for k in range(K)],
        "gradient_norm": 0.4 + math.exp(-3 * done) + float(rng.exponential(0.08)),
        "learning_rate": rate * min(1.0, 50 * step / steps) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    }


def _when(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * 8192, "seconds": round(12 + 1.37 * step, 2)}


def _evaluation(rng, step: int, done: float, K: int) -> dict[str, Any]:
    bend = done - 0.5 * max(0.0, done - 0.85)
    acc = [max(0.01, 0.62 * bend * 0.94**k + float(rng.normal(0, 0.004))) for k in range(K)]
    greedy = [1 + sum(math.prod(acc[: p + 1]) for p in range(k)) for k in range(1, K + 1)]
    sampled = [1 + 0.92 * (x - 1) for x in greedy]
    return {
        "step": step,
        "acc": acc,
        "alpha": [0.9 * x for x in acc],
        "loss": [2.1 + 5 * math.exp(-4 * done) + 0.1 * k for k in range(K)],
        "coverage": 0.97,
        "own_text": 0.41,
        "counted": 16384,
        "drafts": 9000,
        "length_greedy": greedy[-1],
        "length_greedy_by_k": greedy,
        "length_sampled": sampled[-1],
        "length_sampled_by_k": sampled,
    }


def compared(*places, **options):
    """What `compare` finds of the runs in these places."""
    return compare.run(CompareConfig(tuple(map(str, places)), options.pop("out", None), **options))


def data_of(html):
    """What a page shows."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)
