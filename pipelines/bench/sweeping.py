"""What several heads from one stream cost over one alone: reading, and computing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.mesh import make_mesh, sharding
from common.progress import note
from common.store import Store
from pipelines.bench.timing import times
from pipelines.bench.training import DECAY, Size, make_problem
from train import optimizer
from train.order import order
from train.step import State, gradient, train_step
from train.stream import Stream, View
from train.workload import Workload

HEADS, _ROUNDS = 8, 3


def figures(url: str, rows: int) -> dict[str, dict[str, Any]]:
    """sweep.cost_of_8.reading, of the store at `url` with so many rows, and sweep.cost_of_8.computing."""
    note(f"bench: reading for {HEADS} heads, and for one")
    one, several = (_readings(url, rows, heads) for heads in (1, HEADS))
    reading = _best(one, several)
    note(f"bench: steps of {HEADS} heads, and of one")
    alone, all_of_them, together = _steps()
    computing = _best(alone, all_of_them)
    vmapped = _best(alone, together)
    return {
        "sweep.cost_of_8.reading": {
            "value": reading[1] / reading[0],
            "unit": "times",
            "at_most": 1.1,
            "compared_with": f"an epoch of {rows} rows for one head, read, checked and put on the device: "
            f"{reading[0]:.2f} s; the {HEADS} have other draft vocabularies and TTT lengths",
        },
        "sweep.cost_of_8.computing": {
            "value": computing[1] / computing[0],
            "unit": "times",
            "compared_with": f"a step of one head, {computing[0]:.3f} s; {HEADS} as one vmapped program: "
            f"{vmapped[1] / vmapped[0]:.2f} times",
        },
    }


def _best(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """The least seconds of each, measured by turns."""
    found = [(min(times(first, 1)), min(times(second, 1))) for _ in range(_ROUNDS)]
    return min(a for a, _ in found), min(b for _, b in found)


def _readings(url: str, rows: int, heads: int) -> Callable[[], Any]:
    """Reads an epoch for so many heads that take the same rows and differ in what they make of them."""
    store, split = Store.open(url), np.arange(rows)
    wanted = order(split, 0, rows // 4, 4)
    workloads = {steps: Workload(store, split, steps) for steps in (4, 5, 6, 7)}
    views = []
    for number in range(heads):
        workload = workloads[7 - number % 4]
        capacity = workload.capacity(wanted.rows, 1)
        views.append(View(wanted, workload, capacity, "recompute", np.arange(4 + number)))
    stream = Stream(store, make_mesh(), views)

    def read() -> None:
        for dealt in stream.batches():
            arrays = {id(x): x for x in jax.tree.leaves([batch for _, batch in dealt])}  # which heads share
            jax.block_until_ready(list(arrays.values()))

    return read


def _steps() -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]:
    """A step of one head, of all one after the other, and of all as one program."""
    size = Size(rows=1, length=256, steps=3, hidden=256, heads=4, kv_heads=4, ffn=704, draft=2000)
    problem, mesh = make_problem(size), make_mesh()
    adamw = optimizer.make(optimizer.schedule(1e-4, 0.02, 100), 0.5, (0.9, 0.999), 0.0)
    step = train_step(gradient(size.head, mesh, size.steps, DECAY, jnp.float32), adamw)

    def placed(tree: Any, first: str | None = None) -> Any:
        def put(x: Any) -> jax.Array:
            axes = (first, *[None] * x.ndim)[: x.ndim]
            return jax.device_put(x, sharding(mesh, axes))

        return jax.tree.map(put, tree)

    given = placed(problem.frozen), placed(problem.batch, "row")
    states = [
        placed(State(params, adamw.init(params), jnp.int32(0)))
        for params in ({n: x * (1 + 0.01 * i) for n, x in problem.params.items()} for i in range(HEADS))
    ]
    one = jax.jit(step).lower(states[0], *given).compile()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    every = jax.jit(jax.vmap(step, in_axes=(0, None, None))).lower(stacked, *given).compile()
    return (
        lambda: one(states[0], *given),
        lambda: [one(state, *given) for state in states],
        lambda: every(stacked, *given),
    )
