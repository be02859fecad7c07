"""RoPE inverse frequencies with the scalings that published checkpoints name in config.json.

Formulas: transformers `modeling_rope_utils.py`; llama3 (Llama 3.1 release), YaRN (arXiv 2309.00071), linear
(position interpolation), dynamic (NTK-aware, equal to default up to max_position_embeddings).
"""

import math
from typing import Any

import numpy as np

from common.errors import EyasError

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
_OPTIONAL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_SHARED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def check_scaling(scaling: dict[str, Any] | None) -> str:
    """The name of a `rope_scaling` object; EyasError for an unknown kind, an unknown or a missing field."""
    if not scaling:
        return "default"
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in SCALINGS:
        raise EyasError(f"RoPE scaling {kind!r} is not supported; supported are {', '.join(SCALINGS)}")
    given = {name for name, value in scaling.items() if value is not None}
    # `default` and `linear` objects carry leftovers of the scaling they were made from; others must be exact.
    surplus = given - _FIELDS[kind] - _SHARED - {"original_max_position_embeddings", "mrope_section"}
    if kind != "default" and surplus:
        raise EyasError(
            f"RoPE scaling {kind!r} has the unknown field {min(surplus)!r}; remove it or report it"
        )
    missing = _FIELDS[kind] - _OPTIONAL - given
    if missing:
        raise EyasError(f"RoPE scaling {kind!r} lacks {min(missing)!r}; complete config.json")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise EyasError("RoPE scaling 'llama3' needs low_freq_factor below high_freq_factor; correct them")
    return kind


def inverse_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[np.ndarray, float]:
    """(float32 [dim // 2] radians a position, factor for cos and sin) of `dim` rotated dimensions.

    `scaling` is config.json's `rope_scaling` (or `rope_parameters`). EyasError if it is not supported.
    """
    kind = check_scaling(scaling)
    inv = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if kind == "linear":
        inv = inv / scaling["factor"]
    elif kind == "llama3":
        inv = _llama3(inv, scaling)
    elif kind == "yarn":
        return _yarn(inv, dim, theta, scaling)
    return inv.astype(np.float32), 1.0


def _llama3(inv: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * inv / (2 * math.pi)  # whole turns within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * inv / factor + blend * inv


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of attention logits with the context's extension (section 3.4 of the paper)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(inv: np.ndarray, dim: int, theta: float, scaling: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Interpolates slow dimensions, keeps fast ones, with a linear ramp between."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def boundary(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = boundary(scaling.get("beta_fast") or 32)
    high = boundary(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            magnitude(factor, mscale) / magnitude(factor, all_dim)
            if mscale and all_dim
            else magnitude(factor)
        )
    return (inv * (1 - ramp) + inv / factor * ramp).astype(np.float32), float(attention)
