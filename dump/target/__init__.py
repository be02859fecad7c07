"""The frozen target: one decoder, put together from small parts as config.json describes it."""

from common.aux_layers import default_aux_layers
from dump.target.config import read_config
from dump.target.decoder import (
    check_aux_layers,
    check_length,
    forward,
    logits,
    output_head,
)
from dump.target.moe import has_experts, split_experts
from dump.target.spec import TargetConfig
from dump.target.weights import check, load, parameters

__all__ = [
    "TargetConfig",
    "check",
    "check_aux_layers",
    "check_length",
    "default_aux_layers",
    "forward",
    "has_experts",
    "load",
    "logits",
    "output_head",
    "parameters",
    "read_config",
    "split_experts",
]
