"""One head in training: it takes batches one by one, wherever they come from, and keeps its folder."""

import math
import posixpath
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from common import pod, storage
from common.compiling import training_options
from common.config import to_json
from common.errors import EyasError
from common.progress import note
from common.stopping import interruptible
from train import losses, optimizer, placing
from train.batch import Batch, Params
from train.draws import noised, with_draws
from train.evaluate import Evaluator
from train.exported import Exported, lost
from train.logs import Logs
from train.metrics_file import Lines
from train.names import EVALUATION, LENGTH, SINCE_BEST
from train.pace import Saving
from train.plan import Plan
from train.sample import Sample, empty
from train.state import Saved
from train.step import Metrics, State, gradient, train_step
from train.stored import not_finite, whole_teacher


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
    return ends and not lost(plan.config.out)


def _ends(plan: Plan, step: int, last: dict[str, Any]) -> bool:
    """Whether every step is done, or `patience` evaluations in a row found no better head."""
    patience = plan.config.patience
    return step == plan.steps or (patience is not None and last.get(SINCE_BEST, 0) >= patience)


class Trainer:
    """`step` steps are done; `exported` are the heads that it leaves; `status` says briefly how it goes.

    A context, at whose end its last save is on disk.
    """

    def __init__(self, plan: Plan):
        """A new head, or the newest saved state of the plan's folder. EyasError if that cannot be read."""
        self.plan = plan
        c = plan.config
        self._rate = optimizer.schedule(c.learning_rate, c.warmup, plan.steps, c.schedule, c.cooldown)
        self._saved = Saved(plan.config.out)
        before = time.monotonic()
        self._state, noted = self._begin()
        self._seconds = noted["seconds"]  # of the run before this process
        self.exported = Exported(plan, noted["last"], noted["best"])
        self.step = int(self._state.step)
        self._kept = self._saved.step()  # the step of the newest state that is saved or being saved
        told = to_json(plan.config) | {"store_hash": plan.store.hash, "steps": plan.steps}
        logs = plan.config.log_to if pod.is_first() else None
        with pod.together():
            self._lines = Lines(plan.config.out, self.step, noted["last"]["step"])
            self._logs = Logs(logs or (), plan.config.out, told, self._lines.before, self.done)
        # What a killed run measured is measured again: it may have exported that head.
        self._again = frozenset(pod.told(lambda: self._lines.again))
        self._frozen = plan.source.frozen(plan.draft_ids, plan.view.teacher, plan.dtype)
        whole = whole_teacher(plan.store)  # for evaluations
        self._taught = plan.source.frozen(plan.draft_ids, whole, plan.dtype)
        self.evaluator = self._make_evaluator()
        self._compiled: Callable | None = None
        self._unread: Metrics | None = None  # of the step before, which the device may still compute
        self._clock = before
        nbytes = sum(x.nbytes for x in jax.tree.leaves(self._state))
        self._saving = Saving(nbytes, plan.save_every, self.step)
        self.status = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.exported.close()
        self._logs.close(self.done)
        self._lines.close()
        with suppress(EyasError) if kind else nullcontext():  # the first error is the one to tell
            self._saved.close()

    @property
    def done(self) -> bool:
        """Whether every step is, or `patience` evaluations in a row found no better head."""
        return _ends(self.plan, self.step, self.exported.last)

    @property
    def name(self) -> str:
        """The last part of its folder's."""
        return posixpath.basename(self.plan.config.out.rstrip("/"))

    @property
    def saved_step(self) -> int:
        """The step of the newest state on disk; 0 if there is none."""
        return self._saved.step() or 0

    def _begin(self) -> tuple[State, dict[str, Any]]:
        """(state, what was noted beside it) to begin with."""
        plan, declared = self.plan, self.plan.head.parameters()
        if self._saved.step() is None:
            note(f"train: making a head ({plan.config.init})")
            sample = plan.sample()
            made = plan.initial(sample), sample, plan.seed
            where = placing.along(jax.eval_shape(self._new_state, *made), declared, plan.mesh)
            state = jax.jit(self._new_state, out_shardings=where)(*made)
            return state, {"last": {"step": 0}, "best": None, "seconds": 0.0}
        like = jax.eval_shape(self._new_state, plan.shapes(), self.no_sample(), plan.seed)
        state, noted = self._saved.restore(like, placing.along(like, declared, plan.mesh))
        note(f"train: continuing after step {int(state.step)} of {plan.steps}")
        return state, noted

    def _new_state(self, params: Params, sample: Sample, seed: jax.Array) -> State:
        return State(params, self.plan.optimizer(self._rate, sample).init(params), jnp.int32(0), seed)

    def no_sample(self) -> Sample:
        """In the place of a sample where shapes alone matter."""
        hidden = self.plan.store.features["target"]["hidden_size"]
        return empty(self.plan.head.inputs, hidden)

    def _make_evaluator(self) -> Evaluator | None:
        plan, c = self.plan, self.plan.config
        held_out = len(plan.source.test_rows)
        if not held_out:
            note("train: the store has no held-out rows, so best/ is the last head")
            return None
        # Figures of other rows would not tell the better head.
        rows = self.exported.last.get("rows", plan.eval_rows)
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
                options = training_options(self.plan.mesh)
                compiling = partial(self.plan.source.program, lowered, partial(lowered.compile, options))
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
        self._saving.stepped(self.step)

    def _program(self) -> Any:
        plan, c = self.plan, self.plan.config
        loss = losses.make(c.loss, c.lk_scale, c.lk_decay, c.teacher_temperature)
        weights = c.ttt_steps, c.decay, plan.dtype, c.compat, loss, plan.view.shares
        gradients = gradient(plan.head, plan.mesh, *weights)
        rule = plan.optimizer(self._rate, self.no_sample())

        def changed(batch: Batch, state: State) -> Batch:
            return noised(c.noise, with_draws(batch, state.seed, state.step))

        return jax.jit(train_step(gradients, rule, changed), donate_argnums=0)

    @property
    def is_evaluated(self) -> bool:
        """Whether this step is one after which the head is measured, and has not been measured yet."""
        due = self.step % self.plan.eval_every == 0 or self.done or self.step in self._again
        return self.step > self.exported.last["step"] and due

    @property
    def is_saved(self) -> bool:
        """Whether this step is one after which the state is saved."""
        return self._saving.is_due(self.step) or self.done

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
        self.exported.wait()
        with pod.together():
            self._lines.flush()
        self._saving.begin()
        self._saved.save(self._state, self.exported.best, self.exported.last, self._run_seconds)
        self._kept = self.step
        self._saving.plan(self.step)

    def finish(self) -> None:
        """Waits until everything is on disk; of a run that is done, also what somebody has taken away."""
        self._read()
        self.exported.wait()
        if self.done and self.exported.last["step"] == self.step:
            self.exported.restore(self.step, self._weights())
        self._saved.finish()

    def _read(self) -> None:
        """Takes up the metrics of the step that was done last, if that has not been done yet."""
        metrics, self._unread = self._unread, None
        if metrics is None:
            return
        loss = float(metrics.loss)
        norm = float(metrics.gradient_norm)
        if in_a_row := int(metrics.skipped_in_a_row):
            self._skipped(in_a_row, loss, norm)
        elif self.step % self.plan.config.log_every == 0 or self.step == 1 or self.done:
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
        last = self.exported.last
        length = f", acceptance length {last[LENGTH]:.3f}" if LENGTH in last else ""
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
        tokens = self.step * self.plan.config.batch_rows * self.plan.store.length
        return {"step": self.step, "tokens": tokens, "seconds": round(self._run_seconds, 2)}

    @property
    def _run_seconds(self) -> float:
        """What the run took so far, over all of its processes."""
        return self._seconds + time.monotonic() - self._clock

    def _tell(self, line: dict[str, Any]) -> None:
        self._lines.add(line)
        self._logs.add(line)

    def keep(self, metrics: dict[str, Any]) -> None:
        """Begins to export the head, of which an evaluation says this.

        EyasError if the metrics or the loss of the last step are not finite.
        """
        self._read()
        found = self.exported.judged(self.step, metrics)
        if metrics:
            self._require_finite(found)
            with pod.together():
                self._tell(self._now() | {EVALUATION: found})
                self._lines.flush()
        self.exported.keep(self._weights(), found)
        if self.done and self.step < self.plan.steps:
            best = self.exported.best["step"]
            note(f"train: no better head since step {best}, so the run ends at step {self.step}")

    def _require_finite(self, found: dict[str, Any]) -> None:
        """EyasError that says why an evaluation's figures are not finite."""
        if math.isfinite(found[LENGTH] + sum(found["loss"])):
            return
        loss = f"the head of step {self.step} has a loss of {found['loss'][0]} on held-out rows"
        if unsound := pod.told(
            lambda: not_finite(self.plan.store, self.plan.source.test_rows, self.plan.head.inputs)
        ):
            raise EyasError(f"{loss}: {unsound} is not finite; dump {self.plan.store.url} anew")
        raise EyasError(f"{loss}; use a lower --learning-rate, or --dtype float32, in a new folder")

    def _weights(self) -> Params:
        """What is evaluated and exported."""
        return optimizer.weights(self._state.optimizer, self._state.params)
