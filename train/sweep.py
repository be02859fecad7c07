"""Several heads from one stream: every batch is read, checked and put on the devices once, for all.

Their steps are computed one after the other. As one vmapped program, four heads took 1.03 to 1.09 times as
much CPU time (H of 128 and 256 on 2 cores; `make bench` measures it for eight) and four times the
temporaries, and were rounded otherwise: a head would not be the one that it is alone.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

from common import pod, schema, stopping, storage
from common.config import to_json
from common.device_errors import device_errors
from common.errors import DamagedError, EyasError, MachineError
from common.lock import locked
from common.progress import note
from common.schema import Count, TypedDict
from common.stopping import Stop, stopped
from common.storage import require_room
from train import together
from train.config import TrainConfig
from train.experiment import claimed, require_own
from train.names import EXPERIMENT, FAILED
from train.plan import Plan, room
from train.planning import make_plan
from train.run import SMALLER
from train.source import Source
from train.stream import Stream
from train.trainer import Trainer, is_done


class _Failed(TypedDict):
    step: Count
    reason: str


def run(configs: dict[str, TrainConfig], out: str, at_once: int | None = None) -> dict[str, Any]:
    """Trains the heads {name: configuration}, which share a stream, into their folders, or continues.

    Each comes out as `train.run` would make it. Those that are done are left alone, and so are those that
    failed, until their failed.json is deleted. `at_once`: so many heads are trained at a time, None: all.

    Returns {"out", "done", "failed": {name: reason}, "seconds", "stall"}. EyasError for whatever is wrong,
    before anything is computed or written where it can be known before, and after Ctrl-C or SIGTERM, which
    save all states.
    """
    start, first = time.monotonic(), next(iter(configs.values()))
    note(f"sweep: checking {first.store}")
    with pod.together():
        source = Source(first.store, first.dp, first.cache, first.memory, first.sp)
        plans = {name: _plan(name, config, source) for name, config in configs.items()}
        _require_place(plans, out)
        if at_once is None:  # there is memory for what all of them read
            Stream(source.store, source.mesh, [plan.view for plan in plans.values()], source.memory)
    pod.require_same({n: to_json(plan.config) | plan.identity for n, plan in plans.items()}, "experiments")
    smaller = f"give an --at-once below {at_once or len(plans)}, or {SMALLER.removeprefix('give ')}"
    with ExitStack() as held, device_errors(smaller):
        checks = _claimed(plans, out, held)
        with pod.together():
            failed, names = _begun(plans)
        pod.require_same({"failed": failed, "left": names}, "heads to train")
        note(f"sweep: {len(names)} of {len(plans)} heads to train, {len(failed)} failed before")
        waited, size = 0.0, at_once or len(names)
        for group in (names[at : at + size] for at in range(0, len(names), size or 1)):
            waited += _train({name: plans[name] for name in group}, checks, failed).waiting
    seconds = time.monotonic() - start
    return {
        "out": out,
        "done": [name for name in plans if name not in failed],
        "failed": failed,
        "seconds": round(seconds, 3),
        "stall": round(waited / seconds, 4),
    }


def _plan(name: str, config: TrainConfig, source: Source) -> Plan:
    try:
        return make_plan(config, source)
    except MachineError:
        raise
    except EyasError as error:
        raise EyasError(f"experiment {name}: {error}") from None


def _require_place(plans: dict[str, Plan], out: str) -> None:
    """EyasError, with nothing written, if `out` is no place for these heads."""
    if storage.exists(storage.join(out, EXPERIMENT)):
        raise EyasError(f"{out} is a run and no folder of runs; name another one")
    new = [plan for plan in plans.values() if not require_own(plan)]
    need = sum(room(plan.config, plan.head) for plan in new)
    require_room(out, need, f"checkpoints and {len(new)} heads", "name a folder on another disk")


def _claimed(plans: dict[str, Plan], out: str, held: ExitStack) -> list[Callable[[], None]]:
    """Holds all folders while `held` lasts; checks, for the first process, that they still are held."""
    checks: list[Callable[[], None]] = []
    with pod.together():
        if pod.is_first():
            checks.append(held.enter_context(locked(out)))
    return checks + [held.enter_context(claimed(plan)) for plan in plans.values()]


def _begun(plans: dict[str, Plan]) -> tuple[dict[str, str], list[str]]:
    """(the reasons of those that failed, the names of those that are not at their end)."""
    failed = {name: reason for name, plan in plans.items() if (reason := _failed_before(plan))}
    return failed, [name for name, plan in plans.items() if name not in failed and _is_left(plan)]


def _is_left(plan: Plan) -> bool:
    try:
        return not is_done(plan)
    except (MachineError, DamagedError):
        raise
    except EyasError:  # its state cannot be read: its trainer says so, and it alone ends
        return True


def _failed_before(plan: Plan) -> str | None:
    place = storage.join(plan.config.out, FAILED)
    if not storage.exists(place):
        return None
    found = schema.read(_Failed, place, "delete it to try again")
    note(f"sweep: {plan.config.out} failed at step {found['step']}; delete its {FAILED} to try again")
    return found["reason"]


def _train(
    plans: dict[str, Plan], checks: Sequence[Callable[[], None]], failed: dict[str, str]
) -> together.Spent:
    """Trains these heads together; what all spent time on beside. `failed` takes reasons by name."""
    names = {plan.config.out: name for name, plan in plans.items()}

    def fail(plan: Plan, step: int, error: EyasError) -> None:
        name = names[plan.config.out]
        failed[name] = str(error)
        note(f"sweep: {name} ends after step {step}, the others go on: {error}")
        with pod.together():
            if pod.is_first():
                what = _Failed(step=step, reason=str(error))
                storage.write_json(storage.join(plan.config.out, FAILED), what)

    with ExitStack() as held:
        held.enter_context(redirect_stdout(sys.stderr))  # some trackers print
        trainers = []
        for plan in plans.values():
            try:
                with pod.together():
                    stopping.check()
                    trainers.append(held.enter_context(Trainer(plan)))
            except (MachineError, DamagedError):
                raise
            except EyasError as error:  # a damaged state, say
                fail(plan, 0, error)
        if not trainers:
            return together.Spent(0.0, 0.0)
        stop = held.enter_context(Stop())
        try:
            return together.train(
                trainers,
                "sweep",
                stop,
                lambda: [check() for check in checks],
                lambda trainer, error: fail(trainer.plan, trainer.step, error),
            )
        except KeyboardInterrupt as asked:
            saved = min((trainer.saved_step for trainer in trainers), default=0)
            text = (
                f"sweep stopped; every head is saved at step {saved} or later: continue with the same command"
            )
            raise stopped(asked, text) from None
