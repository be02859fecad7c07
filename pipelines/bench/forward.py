"""Figures of a dump's forward pass alone: how near to the machine's matmul rate, and how its memory grows."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.codec import Codec
from common.mesh import make_mesh, sharding
from common.params import shapes
from common.progress import note
from dump import target
from dump.prefill import Program
from dump.target.flops import needed_flops
from pipelines.bench.timing import matmul_rate, times

_TOKENS, _REPEATS = 2048, 3  # a batch, and how often it is computed
_LENGTHS = (512, 2048)
_SHORT, _LONG = 8_192, 32_768


def peak_fraction(model: str) -> dict[str, dict[str, Any]]:
    """dump.peak_fraction: the FLOPs that a batch needs, a second, over those of a large matmul.

    In float32, as a dump computes on a CPU; states and logits as the codec keeps them; documents of whole
    rows.
    """
    note("bench: forward passes of a dump")
    cfg, mesh = target.read_config(model), make_mesh()
    weights = target.load(model, cfg, mesh, jnp.dtype(jnp.float32))
    aux, codec = target.default_aux_layers(cfg.num_layers), Codec("none", 0, "bfloat16")
    rate, rates = matmul_rate(), {}
    for length in _LENGTHS:
        step = Program(cfg, mesh, aux, codec, None, _TOKENS // length, length).compile(weights)
        batch = [jax.device_put(x, sharding(mesh, ("row", None))) for x in _batch(cfg.vocab_size, length)]
        seconds = min(times(lambda step=step, batch=batch: step(weights, {}, *batch), _REPEATS))
        rates[length] = needed_flops(cfg, length) * _TOKENS / seconds
        rate = max(rate, matmul_rate())
    return {
        "dump.peak_fraction": {
            "value": min(rates.values()) / rate,
            "unit": "share",
            "at_least": 0.75,
            "compared_with": f"a float32 matmul of 2,048 cubed: {rate / 1e9:.0f} GFLOP/s; rows of "
            + ", ".join(f"{length:,} tokens: {found / 1e9:.0f}" for length, found in rates.items()),
        }
    }


def _batch(vocabulary: int, length: int) -> tuple[np.ndarray, ...]:
    """int32 [rows, length] tokens, segment ids and positions; a document a row."""
    whole = (_TOKENS // length, length)
    tokens = np.random.default_rng(0).integers(vocabulary, size=whole).astype(np.int32)
    return tokens, np.ones(whole, np.int32), np.tile(np.arange(length, dtype=np.int32), (whole[0], 1))


def attention_growth(model: str) -> dict[str, dict[str, Any]]:
    """dump.attention_growth: the temporaries of a layer for a row four times as long, by the compiler."""
    note(f"bench: compiling a layer for rows of {_SHORT:,} and {_LONG:,} tokens")
    cfg = target.read_config(model)
    short, long = (layer_temporaries(cfg, length) for length in (_SHORT, _LONG))
    return {
        "dump.attention_growth": {
            "value": long / short,
            "unit": "times",
            "at_most": 4.5,
            "compared_with": f"a row of {_SHORT:,} tokens, {short / 1e6:.0f} MB; of {_LONG:,}: "
            f"{long / 1e6:.0f} MB",
        }
    }


def layer_temporaries(cfg: target.TargetConfig, length: int) -> int:
    """Bytes that the target's first layer holds beside its inputs and results for one row, in float32."""
    cfg = replace(cfg, layers=cfg.layers[:1])
    weights = shapes(target.parameters(cfg), jnp.float32)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    layer = jax.jit(lambda weights, *batch: target.forward(cfg, weights, *batch, (0,)))
    return layer.lower(weights, row, row, row).compile().memory_analysis().temp_size_in_bytes
