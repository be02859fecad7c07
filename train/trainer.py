"""One head in training: it takes batches one by one, wherever they come from, and keeps its folder."""

import math
import posixpath
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from common import pod, storage
from common.config import to_json
from common.errors import EyasError
from common.mesh import training_options
from common.progress import note
from common.stopping import interruptible
from train import losses, optimizer, placing
from train.batch import Batch, Params
from train.evaluate import Evaluator
from train.export import WEIGHTS, export, target_identity
from train.logs import Logs
from train.metrics import LENGTH, SINCE_BEST, better
from train.metrics_file import Lines
from train.noise import noised
from train.pace import LOOK, Saving
from train.plan import Plan
from train.sample import Sample, empty
from train.state import Saved
from train.step import Metrics, State, gradient, train_step
from train.stored import at_most, not_finite, whole_teacher


def is_done(plan: Plan) -> bool:
    """Whether the run of this plan is at its end, as its newest state says. EyasError if that is damaged."""
    if not storage.list_names(storage.join(plan.config.out, "state")):
        return False
    saved = Saved(plan.config.out)
    try:
        found = saved.noted()
    finally:
        saved.close()
    if found is None:
        return False
    step, last = found
    ends = _ends(plan, step, last) and last["step"] == step  # else it was stopped in its last evaluation
    return ends and not _lost(plan.config.out)


def _ends(plan: Plan, step: int, last: dict[str, Any]) -> bool:
    """Whether every step is done, or `patience` evaluations in a row found no better head."""
    patience = plan.config.patience
    return step == plan.steps or (patience is not None and last.get(SINCE_BEST, 0) >= patience)


def _lost(out: str) -> list[str]:
    """Which of the heads that a run leaves are no longer there."""
    files = (WEIGHTS, "config.json")
    return [
        name
        for name in ("last", "best")
        if not all(storage.exists(storage.join(out, name, file)) for file in files)
    ]


class Trainer:
    """`step` steps are done; `best` and `last` are the evaluations of the heads in the folders of that name.

    A context, at whose end its last save is on disk. `status` says in a few words how it goes.
    """

    def __init__(self, plan: Plan):
        """A new head, or the newest saved state of the plan's folder. EyasError if that cannot be read."""
        self.plan = self._plan = plan
        c = plan.config
        self._rate = optimizer.schedule(c.learning_rate, c.warmup, plan.steps, c.schedule, c.cooldown)
        self._saved = Saved(plan.config.out)
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] = {"step": 0}
        before = time.monotonic()
        self._seconds = 0.0  # of the run before this process
        self._state = self._begin()
        self.step = int(self._state.step)
        self._kept = self._saved.step()  # the step of the newest state that is saved or being saved
        told = to_json(plan.config) | {"store_hash": plan.store.hash, "steps": plan.steps}
        logs = plan.config.log_to if pod.is_first() else None
        with pod.together():
            self._lines = Lines(plan.config.out, self.step, self.last["step"])
            self._logs = Logs(logs or (), plan.config.out, told, self._lines.before, self.done)
        # What a killed run measured is measured again: it may have exported that head.
        self._again = frozenset(pod.told(lambda: self._lines.again))
        self._frozen = plan.source.frozen(plan.draft_ids, plan.view.teacher, plan.dtype)
        whole = whole_teacher(plan.store)  # for evaluations
        self._taught = plan.source.frozen(plan.draft_ids, whole, plan.dtype)
        self.evaluator = self._make_evaluator()
        self._compiled: Callable | None = None
        self._unread: Metrics | None = None  # of the step before, which the device may still compute
        self._exporting = ThreadPoolExecutor(1, thread_name_prefix="export")
        self._exported: Future | None = None
        self._clock = before
        self._first, self._stepping = self.step, 0.0  # when this process's first step was done
        self._saving = Saving(sum(x.nbytes for x in jax.tree.leaves(self._state)))
        self._save_at = plan.steps if plan.save_every is None else 0
        self.status = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._exporting.shutdown()
        self._logs.close(self.done)
        self._lines.close()
        with suppress(EyasError) if kind else nullcontext():  # the first error is the one to tell
            self._saved.close()

    @property
    def done(self) -> bool:
        """Whether every step is, or `patience` evaluations in a row found no better head."""
        return _ends(self._plan, self.step, self.last)

    @property
    def name(self) -> str:
        """The last part of its folder's."""
        return posixpath.basename(self._plan.config.out.rstrip("/"))

    @property
    def saved_step(self) -> int:
        """The step of the newest state on disk; 0 if there is none."""
        return self._saved.step() or 0

    def _begin(self) -> State:
        plan, declared = self._plan, self._plan.head.parameters()
        if self._saved.step() is None:
            note(f"train: making a head ({plan.config.init})")
            sample = plan.sample()
            made = plan.initial(sample), sample, plan.seed
            where = placing.along(jax.eval_shape(self._new_state, *made), declared, plan.mesh)
            return jax.jit(self._new_state, out_shardings=where)(*made)
        like = jax.eval_shape(self._new_state, plan.shapes(), self.no_sample(), plan.seed)
        state, noted = self._saved.restore(like, placing.along(like, declared, plan.mesh))
        self.best, self.last, self._seconds = noted["best"], noted["last"], noted["seconds"]
        note(f"train: continuing after step {int(state.step)} of {plan.steps}")
        return state

    def _new_state(self, params: Params, sample: Sample, seed: jax.Array) -> State:
        return State(params, self._plan.optimizer(self._rate, sample).init(params), jnp.int32(0), seed)

    def no_sample(self) -> Sample:
        """In the place of a sample where shapes alone matter."""
        hidden = self._plan.store.features["target"]["hidden_size"]
        return empty(len(self._plan.head.aux_layers), hidden)

    def _make_evaluator(self) -> Evaluator | None:
        plan, c = self._plan, self._plan.config
        held_out = len(plan.source.test_rows)
        if not held_out:
            note("train: the store has no held-out rows, so best/ is the last head")
            return None
        rows = self.last.get("rows", plan.eval_rows)  # figures of other rows would not tell the better head
        if rows != plan.eval_rows:
            note(f"train: this run's heads are measured on {rows} held-out rows, as its first was")
        shape = (plan.source, plan.head, plan.draft_ids, c.ttt_steps, c.batch_rows, plan.dtype)
        return Evaluator(*shape, count=rows if rows < held_out else None)

    def compile(self, batch: Batch, check: Callable[[], None] = lambda: None) -> None:
        """Makes the program for batches like this one, if there is none yet; `check` may end the waiting."""
        if self._compiled is None:
            with pod.together():
                note("train: compiling")
                lowered = self._program().lower(self._state, self._frozen, batch)
                options = training_options(self._plan.mesh)
                compiling = partial(self._plan.source.program, lowered, partial(lowered.compile, options))
                self._compiled = interruptible(compiling, check)

    def take(self, batch: Batch) -> None:
        """One step. EyasError once too many steps in a row turn out not to be finite."""
        assert self._compiled
        self._state, metrics = self._compiled(self._state, self._frozen, batch)
        self._read()  # one step late: the device has the next one to do meanwhile
        self.step += 1
        self._unread = metrics
        if not self._saved.is_busy:
            self._saving.end()
        if self.step == self._first + 1:
            self._stepping = time.monotonic()
        if self.step == self._first + LOOK:
            self._plan_save()

    def _plan_save(self) -> None:
        """Decides, for all processes, after which step the state is saved next."""
        if self._plan.save_every is None and self.step > self._first + 1:
            seconds = (time.monotonic() - self._stepping) / (self.step - self._first - 1)
            self._save_at = self.step + pod.told(lambda: self._saving.steps(seconds))

    def _program(self) -> Any:
        plan, c = self._plan, self._plan.config
        loss = losses.make(c.loss, c.lk_scale, c.lk_decay, c.teacher_temperature)
        weights = c.ttt_steps, c.decay, plan.dtype, c.compat, loss, c.anchors
        gradients = gradient(plan.head, plan.mesh, *weights)
        rule = plan.optimizer(self._rate, self.no_sample())

        def changed(batch: Batch, state: State) -> Batch:
            return noised(c.noise, batch, state.seed, state.step)

        return jax.jit(train_step(gradients, rule, changed), donate_argnums=0)

    @property
    def is_evaluated(self) -> bool:
        """Whether this step is one after which the head is measured, and has not been measured yet."""
        due = self.step % self._plan.eval_every == 0 or self.done or self.step in self._again
        return self.step > self.last["step"] and due

    @property
    def is_saved(self) -> bool:
        """Whether this step is one after which the state is saved."""
        every = self._plan.save_every
        due = self.step >= self._save_at if every is None else self.step % every == 0
        return due or self.done

    @property
    def measured(self) -> tuple[Evaluator, Any, Any]:
        """What `score_all` takes."""
        assert self.evaluator
        return self.evaluator, self._weights(), self._taught

    def save(self) -> None:
        """Begins to save the state; what is known of all steps up to it is on disk before."""
        self._read()
        if self._kept == self.step:
            return
        self._wait_for_export()
        with pod.together():
            self._lines.flush()
        self._saving.begin()
        self._saved.save(self._state, self.best, self.last, self._run_seconds)
        self._kept = self.step
        self._plan_save()

    def finish(self) -> None:
        """Waits until everything is on disk; of a run that is done, also what somebody has taken away."""
        self._read()
        self._wait_for_export()
        if self.done and self.last["step"] == self.step:
            self._restore_heads()
        self._saved.finish()

    def _restore_heads(self) -> None:
        """Exports again what is lost of the heads, if the state is that head's; else says that it is lost."""
        out = self._plan.config.out
        lost = pod.told(lambda: _lost(out))
        known = {"last": self.last, "best": self.best or self.last}
        for name in lost:
            if known[name]["step"] != self.step:
                step = known[name]["step"]
                note(
                    f"train: {out}/{name} is lost, the head of step {step}; to have it made again, delete "
                    f"the steps from {step} on in {out}/state and run the same command"
                )
        if again := [name for name in lost if known[name]["step"] == self.step]:
            self._begin_export(again, known[again[0]])
            self._wait_for_export()

    def _read(self) -> None:
        """Takes up the metrics of the step that was done last, if that has not been done yet."""
        metrics, self._unread = self._unread, None
        if metrics is None:
            return
        loss = float(metrics.loss)
        norm = float(metrics.gradient_norm)
        if in_a_row := int(metrics.skipped_in_a_row):
            self._skipped(in_a_row, loss, norm)
        elif self.step % self._plan.config.log_every == 0 or self.step == 1 or self.done:
            self._log(metrics, loss, norm)

    def _skipped(self, in_a_row: int, loss: float, norm: float) -> None:
        """Says that this step changed nothing. EyasError after too many in a row."""
        found = f"the loss is {loss}, the norm of the gradients {norm}"
        if in_a_row == 1:
            note(f"train: step {self.step} is skipped, because {found}")
        if in_a_row >= optimizer.MOST_SKIPPED:
            raise EyasError(
                f"steps {self.step - in_a_row + 1} to {self.step} were all skipped: {found}; use a lower "
                "--learning-rate or --clip, a longer --warmup, or --dtype float32, in a new folder"
            )

    def _log(self, metrics: Metrics, loss: float, norm: float) -> None:
        acc = np.asarray(metrics.acc_K).tolist()
        length = f", acceptance length {self.last[LENGTH]:.3f}" if LENGTH in self.last else ""
        self.status = f"loss {loss:.3f}, acc_0 {acc[0]:.1%}{length}"
        self._tell(
            {
                **self._now(),
                "loss": loss,
                "loss_k": np.asarray(metrics.loss_K).tolist(),
                "acc_in_vocab_k": acc,
                "gradient_norm": norm,
                "skipped": int(metrics.skipped),
                "learning_rate": self._rate(self.step - 1 - int(metrics.skipped)),
            }
        )

    def _now(self) -> dict[str, Any]:
        """Where the run is, at the beginning of every line."""
        tokens = self.step * self._plan.config.batch_rows * self._plan.store.length
        return {"step": self.step, "tokens": tokens, "seconds": round(self._run_seconds, 2)}

    @property
    def _run_seconds(self) -> float:
        """What the run took so far, over all of its processes."""
        return self._seconds + time.monotonic() - self._clock

    def _tell(self, line: dict[str, Any]) -> None:
        self._lines.add(line)
        self._logs.add(line)

    def keep(self, metrics: dict[str, Any]) -> None:
        """Begins to export the head, of which an evaluation says this, to last/, and to best/ if none was
        better.

        EyasError if the metrics or the loss of the last step are not finite.
        """
        self._read()
        is_better = better(metrics, self.best)
        since = 0 if is_better else self.last[SINCE_BEST] + 1
        found: dict[str, Any] = {"step": self.step, SINCE_BEST: since} | metrics
        if metrics:
            if not math.isfinite(found[LENGTH] + sum(found["loss"])):
                loss = f"the head of step {self.step} has a loss of {found['loss'][0]} on held-out rows"
                if unsound := pod.told(lambda: not_finite(self._plan.store, self._plan.source.test_rows)):
                    raise EyasError(f"{loss}: {unsound} is not finite; dump {self._plan.store.url} anew")
                raise EyasError(f"{loss}; use a lower --learning-rate, or --dtype float32, in a new folder")
            with pod.together():
                self._tell(self._now() | {"evaluation": found})
                self._lines.flush()
        self._wait_for_export()
        self.last = found
        folders = ["last"]
        if is_better:
            self.best = found
            folders.append("best")
        self._begin_export(folders, found)
        if self.done and self.step < self._plan.steps:
            note(f"train: no better head since step {self.best['step']}, so the run ends at step {self.step}")

    def _begin_export(self, folders: list[str], found: dict[str, Any]) -> None:
        weights = placing.on_host(self._weights(), "bfloat16")
        if pod.is_first():
            self._exported = self._exporting.submit(self._export, folders, weights, found)

    def _weights(self) -> Params:
        """What is evaluated and exported."""
        return optimizer.weights(self._state.optimizer, self._state.params)

    def _wait_for_export(self) -> None:
        """Until the last export is whole. What is wrong with it is raised on all processes."""
        exported, self._exported = self._exported, None
        with pod.together():
            if exported:
                exported.result()

    def _export(self, folders: list[str], weights: dict[str, np.ndarray], found: dict[str, Any]) -> None:
        plan, steps = self._plan, self._plan.config.ttt_steps
        facts = {
            "target": plan.store.features["target"]["name"],
            "store": plan.store.hash[:16],
            "training step": f"{found['step']} of {plan.steps}",
            "training rows": f"{found['step'] * plan.config.batch_rows} of {plan.store.length} tokens",
            "learning rate": plan.config.learning_rate,
        }
        if LENGTH in found:
            how = f"chain of {steps}, held-out answers walked through as a server does"
            sampled = "; ".join(filter(None, (how, at_most(plan.store))))
            facts |= {
                f"estimated acceptance length, temperature 0 ({how})": found["length_greedy"],
                f"the same, temperature 1 with sampled drafts ({sampled})": found["length_sampled"],
                "held-out rows": found["rows"],
                "of their answers, the target's own first choice": f"{found['own_text']:.1%} of the tokens",
            }
        about = plan.head, plan.draft_ids, plan.store.target_config()
        origin = target_identity(plan.store)
        for name in folders:
            folder = storage.join(plan.config.out, name)
            export(folder, weights, *about, metadata=facts, trained_for=origin)
