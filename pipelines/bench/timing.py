"""Seconds of computations, and the rate that this machine's matmuls reach."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def matmul_rate(size: int = 2048, repeats: int = 5, dtype: Any = jnp.float32) -> float:
    """FLOPs a second of the machine's matmul of random numbers, the best of `repeats`."""
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / min(times(lambda: multiply(a, a), repeats))


def times(run: Callable[[], Any], repeats: int) -> Iterator[float]:
    """Seconds of each of so many runs, after one that is not counted; `run` returns arrays to wait for."""
    jax.block_until_ready(run())
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        yield time.perf_counter() - start
