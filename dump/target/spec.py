"""What a target is made of: layers of an attention and a feed-forward part, and the weights each declares.

A part is a frozen dataclass of sizes with two methods (an attention has more, see Part):
    weights(tp) -> {local name: Weight}             what it needs, and how a mesh of `tp` splits it
    __call__(w, x_BTH, context) -> y_BTH            what it computes from its own {local name: array}
Every dataclass here is hashable, so a TargetConfig can be a static argument of jit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from common.attention import attend
from common.layers import rope_tables
from common.mesh import RULES
from common.rope import inverse_frequencies
from common.safetensors import FLOATS

F32 = np.dtype(np.float32)

Remembered = tuple[tuple[int, ...], Any]  # shape, and dtype or None for the model's own


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint, or `experts` of them stacked.

    `source` is its name in the checkpoint with {layer} and {expert} open; `shape` and `axes` (logical, see
    common/mesh.py) are those of the tensor in the file, without the experts' dimension.
    """

    source: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    experts: int = 0
    expert_axis: str | None = None
    dtype: Any = None  # its dtype in memory; None: the model's own
    stored: tuple[np.dtype, ...] = FLOATS  # the dtypes that it may have in the checkpoint
    other: str | None = None  # another name that it may have in the checkpoint
    squeezed: bool = False  # the checkpoint may have more or fewer dimensions of 1
    linear: bool = False  # the matrix of a linear layer, which a quantised checkpoint may quantise
    transposed: bool = False  # memory holds [in, out], the checkpoint [out, in]

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), self


class Context:
    """What every layer of a forward pass shares: segments, rotation tables, and sums over the mesh.

    `cache`: what the layer being computed, the `repeat`-th of its place, remembers (see remembering.py);
    empty where a pass stands alone.
    """

    def __init__(self, segments_BT: jax.Array, positions_BT: jax.Array, tp: int | None):
        self.segments_BT = segments_BT
        self.positions_BT = positions_BT
        self.tp = tp  # chips that share each layer; None: one has it all
        self.cache: dict[str, jax.Array] = {}
        self.repeat: jax.Array | None = None
        self._tables: dict[Rope, tuple[jax.Array, jax.Array]] = {}

    def attend(
        self,
        q_BTNd: jax.Array,
        k_BTJd: jax.Array,
        v_BTJe: jax.Array,
        scale: float,
        window: int | None = None,
        sinks_N: jax.Array | None = None,
    ) -> jax.Array:
        """Attention [B, T, N, e] of every position to those before it in its document, and to itself."""
        return attend(q_BTNd, k_BTJd, v_BTJe, self.segments_BT, scale, window, sinks_N)

    def tables(self, rope: "Rope") -> tuple[jax.Array, jax.Array]:
        """(cos, sin) [B, T, dim // 2] of a rotation, computed once a pass."""
        if rope not in self._tables:
            inverse, factor = inverse_frequencies(rope.dim, rope.theta, dict(rope.scaling))
            self._tables[rope] = rope_tables(self.positions_BT, inverse, factor)
        return self._tables[rope]

    def total(self, x: jax.Array) -> jax.Array:
        """Sum over the chips that hold parts of a layer (heads, feed-forward width, experts)."""
        return jax.lax.psum(x, RULES["heads"]) if self.tp else x

    def gather(self, x: jax.Array) -> jax.Array:
        """The parts [M / tp, ...] of the chips that share each layer, one behind the other."""
        return jax.lax.all_gather(x, RULES["heads"], tiled=True)

    def splits(self, size: int) -> bool:
        """True where a dimension of `size` is divided over the chips, False where each has all of it."""
        return self.tp is not None and size % self.tp == 0

    def chip(self) -> jax.Array | int:
        """Which part of a split layer is ours."""
        return jax.lax.axis_index(RULES["heads"]) if self.tp else 0


class Part(Protocol):
    """An attention or a feed-forward kind. An attention also says what it computes besides its matrices, and
    what it remembers of a sequence:
        flops(length) -> FLOPs a token of documents of that length
        remembers(length, tokens) -> {local name: (shape, dtype or None for the model's own)}, for sequences
            of up to `length` tokens that grow by up to `tokens` at once
    """

    def weights(self, tp: int) -> dict[str, Weight]: ...

    def __call__(self, w: Mapping[str, jax.Array], x_BTH: jax.Array, context: Context) -> jax.Array: ...


@dataclass(frozen=True)
class Rope:
    """A rotation of the first `dim` dimensions of a head; `scaling` is config.json's object as pairs."""

    dim: int
    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Norm:
    """RMS norm: x / rms(x) * (offset + weight)."""

    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One layer: x += attention(norm(x)); x += feed_forward(norm(x)). `sandwich` norms the outputs as well.

    `renames` are (canonical, own) pieces of weight names where a family has its own. `quantised` are (local
    name, scheme) of the matrices that the checkpoint holds quantised (see quant.py).
    """

    attention: Part
    feed_forward: Part
    norm: Norm
    hidden_size: int
    sandwich: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    quantised: tuple[tuple[str, Any], ...] = ()

    def plain_weights(self, tp: int) -> dict[str, Weight]:
        """The weights that the parts compute with, norms included."""
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        norms = {n: Weight(f"layers.{{layer}}.{n}.weight", (self.hidden_size,), (None,)) for n in names}
        return norms | self.attention.weights(tp) | self.feed_forward.weights(tp)

    def weights(self, tp: int) -> dict[str, Weight]:
        """The weights as they are held: quantised ones with their scales."""
        declared = self.plain_weights(tp)
        for name, scheme in self.quantised:
            declared |= scheme.declare(name, declared[name])
        return declared

    def own_name(self, source: str) -> str:
        """A weight's name in this family's checkpoints."""
        for canonical, own in self.renames:
            source = source.replace(canonical, own)
        return source


@dataclass(frozen=True)
class TargetConfig:
    """A target described by its config.json.

    `raw` is that file; `text` the same of the text decoder alone, with the values that its family's published
    files leave out: what a head is built and served by.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...] = field(repr=False)
    norm: Norm
    tied: bool
    embed_scale: float = 1.0
    max_length: int | None = None  # longest row that is computed exactly; None: any
    max_length_reason: str = ""
    prefix: str = "model."  # of every name in the checkpoint but the output head's
    dequantise: bool = False  # quantised weights become plain when they are loaded, not when they are used
    surplus: tuple[str, ...] = ()  # patterns of tensors in the folder that the forward pass does without
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    text: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)
