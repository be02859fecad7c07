"""EAGLE3 behind the protocol of train/heads/head.py."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax

from common.cached_attention import New
from common.params import Declaration
from train.anchors import behind_first
from train.batch import Batch, Frozen, Inputs, Params
from train.heads.cached import empty
from train.heads.eagle3 import block, cached, card, limits, published, rollout, serving, sizes, start
from train.launch import Method
from train.sample import Sample
from train.servers import PORTABLE, Limit


@dataclass(frozen=True)
class Eagle3(sizes.Sizes):
    """See train/heads/head.py: Head."""

    method: ClassVar[Method] = card.SERVED_AS
    layouts: ClassVar[tuple[str, ...]] = serving.LAYOUTS
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = serving.VARIANTS
    draft_vocab: ClassVar[int | None] = 32_000

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.aux_layers)

    @classmethod
    def for_target(
        cls, target: dict[str, Any], draft_vocab_size: int, aux_layers: tuple[int, ...], **settings: Any
    ) -> Self:
        return cls(**sizes.for_target(target, draft_vocab_size, aux_layers, **settings))

    @classmethod
    def layout_of(cls, config: dict[str, Any]) -> str | None:
        return serving.layout_of(config)

    @classmethod
    def from_serving_config(cls, path: str, config: dict[str, Any], num_target_layers: int) -> Self:
        return serving.read(cls, path, config, num_target_layers)

    @classmethod
    def is_published(cls, config: dict[str, Any]) -> bool:
        return published.is_published(config)

    @classmethod
    def from_published(cls, path: str, config: dict[str, Any], num_target_layers: int) -> Self:
        return cls(**published.read(path, config, num_target_layers))

    def asked(self, settings: dict[str, Any], where: str) -> Self:
        return replace(self, lm_head=published.asked(self, settings, where))

    def sources(self, found: Iterable[str], path: str) -> dict[str, str]:
        return published.sources(self, found, path)

    def parameters(self) -> Declaration:
        return sizes.parameters(self)

    @property
    def rows_of(self) -> str:
        return "embed_tokens" if self.lm_head == "tied" else "lm_head"

    def start(self, noise: Params, sample: Sample, lm_head_DH: jax.Array | None, key: jax.Array) -> Params:
        return start.start(self, noise, sample, lm_head_DH, key)

    def units(self, sample: Sample) -> Params:
        return start.units(self, sample)

    def matrices(self) -> frozenset[str]:
        return sizes.matrices(self)

    def rollout(
        self, params: Params, frozen: Frozen, batch: Batch, steps: int, dtype: Any
    ) -> list[jax.Array]:
        return rollout.rollout(self, params, frozen, batch, steps, dtype)

    def ready(self, params: Params, dtype: Any) -> tuple[Params, Params]:
        return block.weights(self, params, dtype)

    def empty_cache(self, sequences: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        return empty(self.layers, sequences, length, self.num_kv_heads, self.head_dim, dtype)

    def begin(self, ready: tuple[Params, Params], states_BmSH: jax.Array) -> jax.Array:
        B, m, *sizes = states_BmSH.shape
        return block.fused(self, ready[0], states_BmSH.reshape(B * m, *sizes)).reshape(B, m, -1)

    def step(
        self,
        ready: tuple[Params, Params],
        cache: dict[str, jax.Array],
        embedded_BmH: jax.Array,
        state_BmH: jax.Array,
        new: New,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        return cached.step(self, ready, cache, embedded_BmH, state_BmH, new)

    def at_once(
        self,
        ready: tuple[Params, Params],
        cache: dict[str, jax.Array],
        left: tuple[jax.Array, jax.Array],
        starts_B: jax.Array,
        steps: int,
        embed_VH: jax.Array,
    ) -> None:
        return None

    def tensors(self, layout: str) -> dict[str, str]:
        return serving.tensors(self, layout)

    def beside(self, layout: str) -> Declaration:
        return serving.beside(self, layout)

    def still(self) -> frozenset[str]:
        return sizes.still(self)

    def output(self, params: Params) -> jax.Array:
        return params["lm_head.weight"]

    def serving_config(
        self, target: dict[str, Any], dtype: str, layout: str = PORTABLE, verifier: str = ""
    ) -> dict[str, Any]:
        return serving.write(self, target, dtype, layout, verifier)

    def card(self, metadata: Mapping[str, Any], target: dict[str, Any], layout: str) -> str:
        return card.model_card(self, metadata, target, layout)

    def facts(self) -> list[str]:
        return serving.facts(self)

    def limits(self, target: dict[str, Any]) -> list[Limit]:
        return limits.limits(self, target)

    def require_fit(self, target: dict[str, Any], where: str) -> None:
        wanted = self.for_target(target, self.draft_vocab_size, self.aux_layers, ffn=self.ffn)
        serving.require_fit(self, wanted, where)

    def shares(self, anchors: float, steps: int) -> tuple[float, ...]:
        return behind_first(anchors, steps)

    def require_steps(self, steps: int, where: str) -> None:
        pass

    def require_pieces(self, pieces: int, where: str) -> None:
        sizes.require_pieces(self, pieces, where)
