"""The least work of a forward pass: every matrix once, attention over the keys that a query may see.

FLOPs are multiply-adds, twice. Nothing counts that an implementation adds: masked halves of scores, empty
slots of experts, padding.
"""

import math

from dump.target.deltanet import DeltaNet
from dump.target.moe import Moe
from dump.target.spec import Layer, TargetConfig


def needed_flops(cfg: TargetConfig, length: int) -> float:
    """FLOPs a token of rows of `length` tokens (one document a row), output head included."""
    layers = sum(_matrices(layer) + layer.attention.flops(length) for layer in cfg.layers)
    return layers + 2.0 * cfg.vocab_size * cfg.hidden_size


def attention_flops(cfg: TargetConfig, length: int) -> float:
    """The part of it that is scores and sums of values, without linear attention."""
    return sum(la.attention.flops(length) for la in cfg.layers if not isinstance(la.attention, DeltaNet))


def expert_flops(cfg: TargetConfig) -> float:
    """The part of it that routed experts compute."""
    return sum(_matrices(layer, "experts.") for layer in cfg.layers)


def _matrices(layer: Layer, prefix: str = "") -> float:
    """Of the matrices that one token is multiplied with."""
    total = 0.0
    for name, weight in layer.plain_weights(1).items():
        if len(weight.shape) < 2 or not name.startswith(prefix):
            continue
        size = math.prod(weight.shape) * (weight.experts or 1)
        if name.startswith("experts.") and isinstance(layer.feed_forward, Moe):
            router = layer.feed_forward.router
            size *= router.top_k / router.experts
        total += 2.0 * size
    return total
