"""The matmuls of a traced function, those of every inner function, loop and branch included.

Pallas kernels are left out: attention's takes bfloat16 only, see common/splash.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_KINDS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")
_FULL = (jax.lax.Precision.HIGHEST,) * 2


def matmuls(fn: Callable, *arguments: Any) -> list[Any]:
    """The equations of all matmuls of fn(*arguments)."""
    return list(_walk(jax.make_jaxpr(fn)(*arguments).jaxpr))


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            continue
        if equation.primitive.name in _KINDS:
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _walk(inner)


def imprecise(equations: list[Any]) -> list[str]:
    """Those that an accelerator would round: of float32 operands without full precision, or narrow sums."""
    found = []
    for equation in equations:
        kinds = [x.aval.dtype for x in equation.invars[:2]]
        asked, sums = equation.params["precision"], equation.outvars[0].aval.dtype
        full = asked in (_FULL, _FULL[0]) or jnp.float32 not in kinds
        if not full or sums != jnp.float32:
            shapes = [x.aval.str_short() for x in equation.invars[:2]]
            found.append(f"{equation.primitive} of {shapes} in {sums}, precision {asked}")
    return found
