"""A target's weights: declared by its parts, stacked over the layers of a group, read straight to devices.

A stacked weight of group g, place p of its period is named "g.p.LOCAL", [repeats, (experts,) ...].
"""

import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.errors import EyasError
from common.mesh import RULES, sharding, spec
from common.params import Declaration, Param
from common.progress import Progress
from common.safetensors import FLOATS, Checkpoint
from dump.target.groups import group
from dump.target.placing import Placing, Source
from dump.target.spec import Context, TargetConfig, Weight

_READERS = 12  # pieces read at once: one stream from gs:// is slow
# Tensors that checkpoints carry and a forward pass does without: tables, activation and cache scales.
_SURPLUS = (
    r"\.inv_freq$",
    r"\.(input|output|k|v|q|kv|prob)_(proj\.)?(scale|zero_point)$",
    r"\.(masked_)?bias_mask$",
)


@dataclass(frozen=True)
class Stack:
    """A weight of the target and the checkpoint's tensors that it is stacked from (in C order)."""

    weight: Weight
    sources: tuple[str, ...]
    lead: tuple[int, ...]  # dimensions in front: (repeats,), (repeats, experts) or ()
    param: Param


def parameters(cfg: TargetConfig, tp: int = 1) -> Declaration:
    """{name: Param} of every weight as it lies in memory, split over `tp` chips.

    EyasError if `tp` does not divide a dimension that must be split.
    """
    return {name: stack.param for name, stack in stacks(cfg, tp).items()}


def stacks(cfg: TargetConfig, tp: int = 1) -> dict[str, Stack]:
    """Every weight of the target. With tp = 1 no dimension is split, so that none is typed as split."""
    found = _declared(cfg, tp)
    if tp > 1:
        return found
    whole = {name: replace(s.param, axes=(None,) * len(s.param.axes)) for name, s in found.items()}
    return {name: replace(stack, param=whole[name]) for name, stack in found.items()}


def _declared(cfg: TargetConfig, tp: int) -> dict[str, Stack]:
    declared = _ends(cfg, tp)
    for number, found in enumerate(group(cfg.layers)):
        for place, layer in enumerate(found.period):
            layers = found.layers_at(place)
            held = layer.plain_weights(tp) if cfg.dequantise else layer.weights(tp)
            for local, weight in held.items():
                source = cfg.prefix + layer.own_name(weight.source)
                declared[f"{number}.{place}.{local}"] = _stacked(weight, source, layers)
    return declared


def _ends(cfg: TargetConfig, tp: int) -> dict[str, Stack]:
    """Embedding, final norm and output head."""
    V, H = cfg.vocab_size, cfg.hidden_size
    vocab = "vocab" if V % tp == 0 else None
    ends = {
        "embed_tokens": Weight(f"{cfg.prefix}embed_tokens.weight", (V, H), (vocab, None)),
        "norm": Weight(f"{cfg.prefix}norm.weight", (H,), (None,)),
    }
    if not cfg.tied:
        ends["lm_head"] = Weight("lm_head.weight", (V, H), (vocab, None))
    return {
        name: Stack(w, (w.source,), (), Param(w.shape, w.axes, "ones" if name == "norm" else "normal"))
        for name, w in ends.items()
    }


def _stacked(weight: Weight, source: str, layers: list[int]) -> Stack:
    lead = (len(layers), weight.experts) if weight.experts else (len(layers),)
    experts = range(weight.experts) if weight.experts else (0,)
    sources = tuple(source.format(layer=i, expert=e) for i, e in itertools.product(layers, experts))
    axes = (None, weight.expert_axis) if weight.experts else (None,)
    shape, inner = weight.shape, weight.axes
    if weight.transposed:
        shape, inner = shape[::-1], inner[::-1]
    init = "ones" if "norm" in source and len(weight.shape) == 1 else "normal"
    return Stack(weight, sources, lead, Param(lead + shape, axes + inner, init, weight.dtype))


def check(folder: str, cfg: TargetConfig, tp: int = 1) -> None:
    """EyasError unless `load` on a mesh of `tp` would find every tensor as `cfg` says; reads headers only."""
    _checked(folder, cfg, tp)


def _checked(folder: str, cfg: TargetConfig, tp: int) -> tuple[Checkpoint, dict[str, Stack]]:
    declared = stacks(replace(cfg, dequantise=False), tp)
    checkpoint = Checkpoint.open(folder)
    for stack in declared.values():
        for source in stack.sources:
            stored = stack.weight.stored
            checkpoint.require(source, stack.weight.shape, (stored,) if stored else FLOATS)
    _refuse_surplus(checkpoint, cfg, {source for stack in declared.values() for source in stack.sources})
    return checkpoint, declared


def load(folder: str, cfg: TargetConfig, mesh: Mesh, dtype: Any) -> dict[str, jax.Array]:
    """{name: array} on `mesh` with its final sharding; each process reads only the slices its chips own.

    All names, shapes and dtypes are checked before anything is allocated. EyasError names what is wrong.
    """
    checkpoint, declared = _checked(folder, cfg, mesh.shape[RULES["heads"]])
    placings = {name: _placing(checkpoint, stack, mesh, dtype) for name, stack in declared.items()}
    late = _quantised(cfg, mesh) if cfg.dequantise else {}
    total = sum(placing.nbytes for placing in placings.values())
    weights = {}
    with Progress("reading weights", total, "B") as progress, ThreadPoolExecutor(_READERS) as pool:

        def place(name: str) -> jax.Array:
            return placings[name].run(pool, progress.update)

        for name in declared:
            if name in late:
                weights[name] = late[name](place(name), place(f"{name}.scale"), dtype)
            elif name.removesuffix(".scale") not in late:
                weights[name] = place(name)
    return weights


def _placing(checkpoint: Checkpoint, stack: Stack, mesh: Mesh, dtype: Any) -> Placing:
    names = np.array(stack.sources).reshape(stack.lead)
    source = Source(names, stack.weight.shape, stack.param.shape, stack.weight.transposed)
    return Placing(checkpoint, source, np.dtype(stack.param.dtype or dtype), sharding(mesh, stack.param.axes))


def _quantised(cfg: TargetConfig, mesh: Mesh) -> dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]]:
    """{name: (stored, scale, dtype) -> plain} of the quantised weights, computed where they lie."""
    tp = mesh.shape[RULES["heads"]]
    held, plain = stacks(replace(cfg, dequantise=False), tp), stacks(replace(cfg, dequantise=True), tp)
    found = {}
    for number, part in enumerate(group(cfg.layers)):
        for place, layer in enumerate(part.period):
            weights = layer.plain_weights(tp)
            for local, scheme in layer.quantised:
                name = f"{number}.{place}.{local}"
                specs = [spec(held[n].param.axes) for n in (name, f"{name}.scale")]
                at = partial(_plain, scheme, weights[local], tp if tp > 1 else None)
                out = spec(plain[name].param.axes)
                found[name] = partial(_on_chips, at, mesh, tuple(specs), out)
    return found


def _on_chips(at: Callable, mesh: Mesh, specs: tuple, out: Any, value, scale, dtype: Any) -> jax.Array:
    local = jax.shard_map(partial(at, dtype), mesh=mesh, in_specs=specs, out_specs=out)
    return jax.jit(local)(value, scale)


def _plain(scheme: Any, weight: Weight, tp: int | None, dtype: Any, value, scale) -> jax.Array:
    """All layers of a stack [repeats, ...] in `dtype`: each as it would be when it runs."""
    context = Context(None, None, tp)
    return jax.lax.map(lambda pair: scheme.apply(*pair, weight, dtype, context), (value, scale))


def _refuse_surplus(checkpoint: Checkpoint, cfg: TargetConfig, used: set[str]) -> None:
    """EyasError naming a tensor that neither the config nor a known kind of leftover explains."""
    known = [re.compile(pattern) for pattern in _SURPLUS + cfg.surplus + (("^lm_head",) if cfg.tied else ())]
    later = re.compile(re.escape(cfg.prefix) + r"layers\.(\d+)\.")  # prediction layers behind the last
    for name in sorted(checkpoint.tensors.keys() - used):
        layer = later.match(name)
        if (layer and int(layer[1]) >= cfg.num_layers) or any(pattern.search(name) for pattern in known):
            continue
        raise EyasError(f"{checkpoint.folder} has the tensor {name}, which its config.json does not explain")
