"""Which experts a token goes to, and with which weights.

Behaviour: transformers `models/{qwen3_moe,deepseek_v2,deepseek_v3,minimax_m2,gpt_oss}`; group-limited
routing with bias correction: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Dimensions: M tokens, E experts, k experts a token, G groups of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from common.layers import einsum
from dump.target.spec import F32, Weight


@dataclass(frozen=True)
class Router:
    """Chooses `top_k` of `experts` by scores = softmax or sigmoid of logits, computed in float32.

    `selected_softmax`: the softmax is taken over the chosen logits alone. `correction`: a bias that counts
    in the choice and not in the weights. `groups`: only experts of the `groups_kept` best groups can be
    chosen; a group's score is the sum of its `group_best` best experts' scores.
    """

    hidden: int
    experts: int
    top_k: int
    scoring: str = "softmax"  # or "sigmoid", "selected_softmax"
    renormalise: bool = False
    scale: float = 1.0
    module: str = "mlp.gate"
    bias: bool = False
    correction: str | None = None  # name of the correction bias in the checkpoint, relative to the layer
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 2

    def weights(self) -> dict[str, Weight]:
        """Every chip routes all tokens of its rows."""
        E, H = self.experts, self.hidden
        place = f"layers.{{layer}}.{self.module}"
        declared = {"router": Weight(f"{place}.weight", (E, H), (None, None), dtype=F32)}
        if self.bias:
            declared["router.bias"] = Weight(f"{place}.bias", (E,), (None,), dtype=F32)
        if self.correction:
            name = f"layers.{{layer}}.{self.correction}"
            declared["router.correction"] = Weight(name, (E,), (None,), dtype=F32)
        return declared

    def __call__(self, w: Mapping[str, jax.Array], x_MH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(ids int32 [M, k], weights float32 [M, k])."""
        logits_ME = einsum("mh,eh->me", x_MH.astype(jnp.float32), w["router"])
        if self.bias:
            logits_ME = logits_ME + w["router.bias"][None]
        if self.scoring == "selected_softmax":
            chosen, ids = jax.lax.top_k(logits_ME, self.top_k)
            return ids, jax.nn.softmax(chosen, -1)
        sigmoid = self.scoring == "sigmoid"
        scores_ME = jax.nn.sigmoid(logits_ME) if sigmoid else jax.nn.softmax(logits_ME, -1)
        _, ids = jax.lax.top_k(self._choice(w, scores_ME), self.top_k)
        weights = jnp.take_along_axis(scores_ME, ids, -1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return ids, weights * self.scale

    def _choice(self, w: Mapping[str, jax.Array], scores_ME: jax.Array) -> jax.Array:
        """Scores as the choice sees them."""
        if self.correction:
            scores_ME = scores_ME + w["router.correction"][None]
        if self.groups == 1:
            return scores_ME
        scores_MGX = scores_ME.reshape(-1, self.groups, self.experts // self.groups)
        best_MG = jax.lax.top_k(scores_MGX, self.group_best)[0].sum(-1)
        _, kept = jax.lax.top_k(best_MG, self.groups_kept)
        open_MG = (kept[:, :, None] == jnp.arange(self.groups)[None, None]).any(1)
        return jnp.where(open_MG[..., None], scores_MGX, -jnp.inf).reshape(scores_ME.shape)
