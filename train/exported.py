"""last/ and best/ of a run: its newest head that was measured, and the best one, each with its evaluation."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from common import pod, storage
from common.progress import note
from train import placing
from train.batch import Params
from train.export import WEIGHTS, export, target_identity
from train.metrics import better
from train.names import LENGTH, SINCE_BEST
from train.plan import Plan
from train.stored import at_most

_WHOLE = (WEIGHTS, "config.json")  # the files without which a head is lost


def lost(out: str) -> list[str]:
    """Which of the heads that a run leaves are no longer there."""
    return [
        name
        for name in ("last", "best")
        if not all(storage.exists(storage.join(out, name, file)) for file in _WHOLE)
    ]


class Exported:
    """`last` and `best` are the evaluations of the heads in the folders of these names; before there are any,
    {"step": 0} and None. Heads are written one after the other, while the run goes on."""

    def __init__(self, plan: Plan, last: dict[str, Any] | None = None, best: dict[str, Any] | None = None):
        self._plan = plan
        self.last: dict[str, Any] = last or {"step": 0}
        self.best = best
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._pending: Future | None = None

    def judged(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """The evaluation of the head of `step`, of which these metrics were found."""
        since = 0 if better(metrics, self.best) else self.last[SINCE_BEST] + 1
        return {"step": step, SINCE_BEST: since} | metrics

    def keep(self, params: Params, evaluation: dict[str, Any]) -> None:
        """Begins to write a head to last/, and to best/ if none was better. Waits for the one before."""
        self.wait()
        self.last = evaluation
        folders = ["last"]
        if evaluation[SINCE_BEST] == 0:
            self.best = evaluation
            folders.append("best")
        self._begin(folders, params, evaluation)

    def restore(self, step: int, params: Params) -> None:
        """Writes again what is lost of the heads, if it is the one of `step`; else says that it is lost."""
        out = self._plan.config.out
        known = {"last": self.last, "best": self.best or self.last}
        again = []
        for name in pod.told(lambda: lost(out)):
            if (kept := known[name]["step"]) == step:
                again.append(name)
                continue
            note(
                f"train: {out}/{name} is lost, the head of step {kept}; to have it made again, delete "
                f"the steps from {kept} on in {out}/state and run the same command"
            )
        if again:
            self._begin(again, params, known[again[0]])
            self.wait()

    def wait(self) -> None:
        """Until the last head is whole. What is wrong with it is raised on all processes."""
        pending, self._pending = self._pending, None
        with pod.together():
            if pending:
                pending.result()

    def close(self) -> None:
        """No more heads; the last one is written to its end."""
        self._writer.shutdown()

    def _begin(self, folders: list[str], params: Params, evaluation: dict[str, Any]) -> None:
        weights = placing.on_host(params, "bfloat16")
        if pod.is_first():
            self._pending = self._writer.submit(self._write, folders, weights, evaluation)

    def _write(self, folders: list[str], weights: dict[str, np.ndarray], evaluation: dict[str, Any]) -> None:
        plan, facts = self._plan, _facts(self._plan, evaluation)
        about = plan.head, plan.draft_ids, plan.store.target_config()
        origin = target_identity(plan.store)
        for name in folders:
            folder = storage.join(plan.config.out, name)
            export(folder, weights, *about, metadata=facts, trained_for=origin)


def _facts(plan: Plan, evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the card of a head says of how it was made and what it scores."""
    step = evaluation["step"]
    facts = {
        "target": plan.store.features["target"]["name"],
        "store": plan.store.hash[:16],
        "training step": f"{step} of {plan.steps}",
        "training rows": f"{step * plan.config.batch_rows} of {plan.store.length} tokens",
        "learning rate": plan.config.learning_rate,
    }
    if LENGTH in evaluation:
        how = f"chain of {plan.config.ttt_steps}, held-out answers walked through as a server does"
        sampled = "; ".join(filter(None, (how, at_most(plan.store))))
        facts |= {
            f"estimated acceptance length, temperature 0 ({how})": evaluation[LENGTH],
            f"the same, temperature 1 with sampled drafts ({sampled})": evaluation["length_sampled"],
            "held-out rows": evaluation["rows"],
            "of their answers, the target's own first choice": f"{evaluation['own_text']:.1%} of the tokens",
        }
    return facts
