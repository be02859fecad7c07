"""The training loop: rows -> TTT rollout -> AdamW, with evaluations, and a state to resume from."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import storage
from common.errors import EyasError
from common.mesh import sharding
from common.progress import Progress, note
from common.stopping import Stop
from train import optimizer, stream
from train.config import TrainConfig
from train.evaluate import Evaluator
from train.export import export
from train.metrics import better
from train.plan import Experiment, claim, frozen, make
from train.state import Lines, Saved
from train.step import Metrics, State, gradient, train_step

__all__ = ["TrainConfig", "run"]


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains a head from `config.store` into `config.out`, or continues: the weights come out the same.

    Returns {"out", "steps", "steps_before", "rows", "tokens", "seconds", "tokens_per_s", "stall", "best",
    "last"}, of this run but for steps, best and last. EyasError for whatever is wrong, before anything is
    computed or written where it can be known before, and after Ctrl-C or SIGTERM, which save the state.
    """
    start = time.monotonic()
    note(f"train: checking {config.store}")
    experiment = make(config)
    claim(experiment)
    note(_announce(experiment))
    with Stop() as stop:
        training = _Run(experiment, stop)
        try:
            return training.go(start)
        except KeyboardInterrupt:
            saved = training.saved.step() or 0
            raise EyasError(
                f"train stopped; step {saved} of {experiment.steps} is saved in {config.out}/state: continue "
                "with the same command"
            ) from None


def _announce(e: Experiment) -> str:
    B, T = e.config.batch_rows, e.store.length
    parameters = sum(int(np.prod(x.shape)) for x in e.shapes().values())
    return (
        f"train: {e.steps} steps of {B} x {T} tokens, {e.plan.counted:,} counted positions an epoch; a "
        f"head of {parameters / 1e6:.1f}M parameters, draft vocabulary {len(e.draft_ids):,}; "
        f"an evaluation every {e.eval_every} steps, a checkpoint every {e.save_every}"
    )


class _Run:
    """One experiment in progress."""

    def __init__(self, experiment: Experiment, stop: Stop):
        self.e, self.stop = experiment, stop
        c = experiment.config
        self.rate = optimizer.schedule(c.learning_rate, c.warmup, experiment.steps)
        self.optimizer = experiment.optimizer(self.rate)
        e = experiment
        self.taught = frozen(e.store, e.draft_ids, e.config.teacher, e.mesh, e.dtype)
        self.saved = Saved(c.out)
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] = {"step": 0}
        self.state = self._begin()
        self.first = int(self.state.step)
        self.lines = Lines(c.out, self.first)
        self.evaluator = self._evaluator()

    def _begin(self) -> State:
        """The newest saved state, or a new one."""
        everywhere = sharding(self.e.mesh, ())
        if self.saved.step() is None:
            note(f"train: making a head ({self.e.config.init})")
            return jax.device_put(self._state(self.e.initial()), everywhere)
        state, noted = self.saved.restore(jax.eval_shape(self._state, self.e.shapes()), everywhere)
        self.best, self.last = noted["best"], noted["last"]
        note(f"train: continuing after step {int(state.step)} of {self.e.steps}")
        return state

    def _state(self, params: Any) -> State:
        return State(params, self.optimizer.init(params), jnp.int32(0))

    def _evaluator(self) -> Evaluator | None:
        e = self.e
        if not len(e.test_rows):
            note("train: the store has no held-out rows, so best/ is the last head")
            return None
        c = e.config
        return Evaluator(
            e.store, e.test_rows, e.head, e.draft_ids, e.mesh, c.ttt_steps, c.batch_rows, e.dtype, c.teacher
        )

    def go(self, start: float) -> dict[str, Any]:
        """All steps that are left; then the result of `run`."""
        e = self.e
        source = e.stream()
        began = time.monotonic()
        if self._is_evaluated(self.first) and self.last["step"] < self.first:
            self._evaluate(self.first)  # the run was stopped just before
        if self.first < e.steps:
            self._steps(source)
        self.saved.finish()
        self.saved.close()
        seconds = time.monotonic() - began
        tokens = (e.steps - self.first) * e.config.batch_rows * e.store.length
        return {
            "out": e.config.out,
            "steps": e.steps,
            "steps_before": self.first,
            "rows": (e.steps - self.first) * e.config.batch_rows,
            "tokens": tokens,
            "seconds": round(time.monotonic() - start, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "stall": round(source.waited / seconds, 4),
            "best": self.best,
            "last": self.last,
        }

    def _compile(self, batch: stream.Batch) -> Callable:
        e, c = self.e, self.e.config
        note("train: compiling")
        gradients = gradient(e.head, e.mesh, c.ttt_steps, c.decay, e.dtype, c.compat)
        step = jax.jit(train_step(gradients, self.optimizer), donate_argnums=0)
        return step.lower(self.state, self.taught, batch).compile()

    def _steps(self, source: stream.Stream) -> None:
        e, c = self.e, self.e.config
        tokens = c.batch_rows * e.store.length
        total = e.steps * tokens
        compiled = None
        pending: tuple[int, Metrics] | None = None
        clock = time.monotonic()
        batches = source.batches(e.order[self.first :])
        with Progress("train", total, "tok", done=self.first * tokens) as progress:
            for step, batch in enumerate(batches, self.first + 1):
                if compiled is None:
                    compiled = self._compile(batch)
                self.state, metrics = compiled(self.state, self.taught, batch)
                if pending:  # read one step late: the device has the next one to do meanwhile
                    self._log(*pending, tokens, time.monotonic() - clock, progress)
                pending = (step, metrics) if step % c.log_every == 0 or step in (1, e.steps) else None
                progress.update(tokens)
                stopping = self.stop.asked and step < e.steps
                if self._is_evaluated(step) and not stopping:
                    self._evaluate(step)
                if step % e.save_every == 0 or step == e.steps or stopping:
                    self.saved.save(self.state, {"best": self.best, "last": self.last})
                if stopping:
                    self._end(step)
            if pending:
                self._log(*pending, tokens, time.monotonic() - clock, progress)

    def _is_evaluated(self, step: int) -> bool:
        return step > 0 and (step % self.e.eval_every == 0 or step == self.e.steps)

    def _end(self, step: int) -> None:
        """KeyboardInterrupt, once the state is on disk."""
        self.saved.finish()
        self.stop.check()

    def _log(self, step: int, metrics: Metrics, tokens: int, seconds: float, progress: Progress) -> None:
        loss = float(metrics.loss)
        if not np.isfinite(loss):
            raise EyasError(
                f"the loss is {loss} at step {step}; use a lower --learning-rate, or --dtype float32, in a "
                "new folder"
            )
        acc = np.asarray(metrics.acc_K).tolist()
        progress.update(0, f"loss {loss:.3f}, first token right {acc[0]:.1%}")
        self.lines.add(
            {
                "step": step,
                "tokens": step * tokens,
                "loss": loss,
                "loss_k": np.asarray(metrics.loss_K).tolist(),
                "acc_in_vocab_k": acc,
                "gradient_norm": float(metrics.gradient_norm),
                "learning_rate": float(self.rate(step - 1)),
                "seconds": round(seconds, 2),
            }
        )

    def _evaluate(self, step: int) -> None:
        """Measures the head, exports it to last/, and to best/ if it is the best so far."""
        found: dict[str, Any] = {"step": step}
        if self.evaluator:
            found |= self.evaluator(self.state.params, self.taught, f"evaluate step {step}")
            self.lines.add({"step": step, "evaluation": found})
        self.last = found
        self._export("last", found)
        if better(found, self.best):
            self.best = found
            self._export("best", found)

    def _export(self, name: str, found: dict[str, Any]) -> None:
        e = self.e
        target, steps = e.store.features["target"], e.config.ttt_steps
        facts = {
            "target": target["name"],
            "store": e.store.hash[:16],
            "training step": f"{found['step']} of {e.steps}",
            "training rows": f"{found['step'] * e.config.batch_rows} of {e.store.length} tokens",
            "learning rate": e.config.learning_rate,
        }
        if "length_greedy" in found:
            how = f"chain of {steps}, held-out answers walked through as a server does"
            facts |= {
                f"estimated acceptance length, temperature 0 ({how})": found["length_greedy"],
                f"the same, temperature 1 with sampled drafts ({how})": found["length_sampled"],
                "held-out rows": len(e.test_rows),
                "of their answers, the target's own first choice": f"{found['own_text']:.1%} of the tokens",
            }
        folder = storage.join(e.config.out, name)
        export(folder, self.state.params, e.head, e.draft_ids, e.store.target_config(), metadata=facts)
