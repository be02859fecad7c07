"""A target's weights: declared by its parts, stacked over the layers of a group, read straight to devices.

A stacked weight of group g, place p of its period is named "g.p.LOCAL", [repeats, (experts,) ...].
"""

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.errors import EyasError
from common.fsdp import divided, gathered, own_part
from common.mesh import sharding, spec, ways
from common.params import Declaration, Param
from common.progress import Progress
from common.safetensors import Checkpoint, Tensor
from dump.target.groups import group
from dump.target.placing import Placing, Source
from dump.target.spec import Context, TargetConfig, Weight

_READERS = 12  # pieces read at once: one stream from gs:// is slow
# Tensors that checkpoints carry and a forward pass does without: tables, activation and cache scales.
_SURPLUS = (
    r"\.inv_freq$",
    r"[._](input|output|activation|act|k|v|q|kv|prob)_(proj\.)?(scale|zero_point)(_ub|_inv)?$",
    r"\.(masked_)?bias_mask$",
)


@dataclass(frozen=True)
class Stack:
    """A weight of the target, stacked over `layers` (none: a weight beside the layers) and over experts.

    Its names are those of the family's checkpoints.
    """

    weight: Weight
    layers: tuple[int, ...]
    param: Param
    divided: bool = True  # over chips that compute different rows

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions in front: (layers, experts), (layers,) or ()."""
        experts = (self.weight.experts,) if self.weight.experts else ()
        return (len(self.layers), *experts) if self.layers else ()

    def sources(self, name: str | None = None) -> Iterator[str]:
        """Names of the checkpoint's tensors in the order of `lead`; `name`: the weight's other name."""
        places = itertools.product(self.layers or (0,), range(self.weight.experts or 1))
        return ((name or self.weight.source).format(layer=i, expert=e) for i, e in places)


def parameters(cfg: TargetConfig, tp: int = 1, dp: int = 1) -> Declaration:
    """{name: Param} of every weight as it lies in the memory of a (dp, tp) mesh.

    EyasError if `tp` does not divide a dimension that must be split.
    """
    return {name: stack.param for name, stack in stacks(cfg, tp, dp).items()}


def stacks(cfg: TargetConfig, tp: int = 1, dp: int = 1) -> dict[str, Stack]:
    """Every weight of the target. With tp = 1 or dp = 1 no dimension is typed as split over it."""

    def laid_out(stack: Stack) -> Stack:
        param = stack.param if tp > 1 else replace(stack.param, axes=(None,) * len(stack.param.axes))
        return replace(stack, param=divided(param, len(stack.lead[:1]), dp if stack.divided else 1))

    return {name: laid_out(stack) for name, stack in _declared(cfg, tp).items()}


def _declared(cfg: TargetConfig, tp: int) -> dict[str, Stack]:
    declared = _ends(cfg, tp)
    for number, found in enumerate(group(cfg.layers)):
        for place, layer in enumerate(found.period):
            held = layer.plain_weights(tp) if cfg.dequantise else layer.weights(tp)
            # Beside experts all else is small, and they would wait while it is gathered.
            experts = {local for local in held if local.startswith("experts.")}
            for local, weight in held.items():
                other = weight.other and cfg.prefix + layer.own_name(weight.other)
                named = replace(weight, source=cfg.prefix + layer.own_name(weight.source), other=other)
                stack = _stacked(named, tuple(found.layers_at(place)))
                divided = not experts or local in experts
                declared[f"{number}.{place}.{local}"] = replace(stack, divided=divided)
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
        name: Stack(w, (), Param(w.shape, w.axes, "ones" if name == "norm" else "normal"))
        for name, w in ends.items()
    }


def _stacked(weight: Weight, layers: tuple[int, ...]) -> Stack:
    experts = (weight.experts,) if weight.experts else ()
    axes = (None, weight.expert_axis) if weight.experts else (None,)
    shape, inner = weight.shape, weight.axes
    if weight.transposed:
        shape, inner = (*shape[:-2], shape[-1], shape[-2]), (*inner[:-2], inner[-1], inner[-2])
    init = "ones" if "norm" in weight.source and len(weight.shape) == 1 else "normal"
    return Stack(weight, layers, Param((len(layers), *experts, *shape), axes + inner, init, weight.dtype))


def check(folder: str, cfg: TargetConfig, tp: int = 1) -> None:
    """EyasError unless `load` on a mesh of `tp` would find every tensor as `cfg` says; reads headers only."""
    _checked(folder, cfg, tp, 1)


def _sizes(mesh: Mesh) -> tuple[int, int]:
    return ways(mesh, "heads"), ways(mesh, "fsdp")


def _checked(folder: str, cfg: TargetConfig, tp: int, dp: int) -> tuple[Checkpoint, dict[str, Stack]]:
    """The checkpoint, its tensors under the declared names and in the declared shapes; the declarations."""
    declared = stacks(replace(cfg, dequantise=False), tp, dp)
    checkpoint = Checkpoint.open(folder)
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for stack in declared.values():
        for names in zip(stack.sources(), stack.sources(stack.weight.other), strict=True):
            name = next((name for name in names if name in checkpoint.tensors), names[0])
            found[names[0]] = _find(checkpoint, name, stack.weight)
            used.add(name)
    _refuse_surplus(checkpoint, cfg, used)
    return Checkpoint(folder, found), declared


def _find(checkpoint: Checkpoint, name: str, weight: Weight) -> Tensor:
    """The tensor of a weight, in the weight's shape; EyasError if it has another shape or dtype."""
    tensor = checkpoint.tensors.get(name)
    if tensor and weight.squeezed and _squeezed(tensor.shape) == _squeezed(weight.shape):
        return replace(checkpoint.require(name, tensor.shape, weight.stored), shape=weight.shape)
    return checkpoint.require(name, weight.shape, weight.stored)


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


def load(folder: str, cfg: TargetConfig, mesh: Mesh, dtype: Any) -> dict[str, jax.Array]:
    """{name: array} on `mesh` with its final sharding; each process reads only the slices its chips own.

    All names, shapes and dtypes are checked before anything is allocated. EyasError names what is wrong.
    """
    checkpoint, declared = _checked(folder, cfg, *_sizes(mesh))
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
    names = np.array(list(stack.sources())).reshape(stack.lead)
    source = Source(names, stack.weight.shape, stack.param.shape, stack.weight.transposed)
    return Placing(checkpoint, source, np.dtype(stack.param.dtype or dtype), sharding(mesh, stack.param.axes))


def _quantised(cfg: TargetConfig, mesh: Mesh) -> dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]]:
    """{name: (stored, scale, dtype) -> plain} of the quantised weights, computed where they lie."""
    tp, dp = _sizes(mesh)
    held, plain = (stacks(replace(cfg, dequantise=late), tp, dp) for late in (False, True))
    found = {}
    for number, part in enumerate(group(cfg.layers)):
        for place, layer in enumerate(part.period):
            weights = layer.plain_weights(tp)
            for local, scheme in layer.quantised:
                name = f"{number}.{place}.{local}"
                stored = {n: held[n].param.axes for n in (name, f"{name}.scale")}
                out = plain[name].param.axes
                at = partial(_plain, scheme, weights[local], tp if tp > 1 else None, stored, out)
                found[name] = partial(_on_chips, at, mesh, tuple(map(spec, stored.values())), spec(out))
    return found


def _on_chips(at: Callable, mesh: Mesh, specs: tuple, out: Any, value, scale, dtype: Any) -> jax.Array:
    local = jax.shard_map(partial(at, dtype), mesh=mesh, in_specs=specs, out_specs=out)
    return jax.jit(local)(value, scale)


def _plain(scheme, weight: Weight, tp: int | None, stored: dict, out: tuple, dtype: Any, *arrays):
    """All layers of a stack [repeats, ...] in `dtype`: each as it would be when it runs, of that our part."""
    context, axes = Context(None, None, tp), {name: found[1:] for name, found in stored.items()}

    def layer(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        whole = gathered(dict(zip(stored, pair, strict=True)), axes)
        return own_part(scheme.apply(*whole.values(), weight, dtype, context), out[1:])

    return jax.lax.map(layer, arrays)


def _refuse_surplus(checkpoint: Checkpoint, cfg: TargetConfig, used: set[str]) -> None:
    """EyasError naming a tensor that neither the config nor a known kind of leftover explains."""
    known = [re.compile(pattern) for pattern in _SURPLUS + cfg.surplus + (("^lm_head",) if cfg.tied else ())]
    later = re.compile(re.escape(cfg.prefix) + r"layers\.(\d+)\.")  # prediction layers behind the last
    for name in sorted(checkpoint.tensors.keys() - used):
        layer = later.match(name)
        if (layer and int(layer[1]) >= cfg.num_layers) or any(pattern.search(name) for pattern in known):
            continue
        raise EyasError(f"{checkpoint.folder} has the tensor {name}, which its config.json does not explain")
