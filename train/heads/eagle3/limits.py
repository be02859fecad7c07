"""Which servers would refuse which EAGLE3 head, or read it as something else.

Read off their loaders at the versions of train/servers.py. That the weights of every variant come out as the
head that was trained is compared, as far as their code runs on a CPU, by tests/train/loaders.
"""

from typing import Any

from common.aux_layers import is_default
from train.heads.eagle3.sizes import Sizes
from train.servers import Limit
from train.serving_config import canonical_rope

_PLAIN = ("sglang-jax", "tpu-inference", "eagle")  # which know the head of the paper alone
_TRANSFORMERS_5 = ("vllm", "sglang", "tpu-inference", "speculators")
# The targets whose hidden states a server hands out to a head, of those that can be dumped; SGLang: of all.
_LLAMA = ("LlamaForCausalLM",)
_DEEPSEEK = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_TARGETS = {
    "vllm": (
        *(*_LLAMA, *_DEEPSEEK, "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "GptOssForCausalLM", "MiniMaxM2ForCausalLM"),
        "GlmMoeDsaForCausalLM",
    ),
    "sglang-jax": (*_LLAMA, "Qwen3ForCausalLM"),
    "tpu-inference": _LLAMA,
    "eagle": (*_LLAMA, "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
}
# These count custom layers from the layer before only where the first of them is 1.
_SGLANG_GUESSES = (*_DEEPSEEK, "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM")
_JAX_SCALINGS = {"sglang-jax": ("llama3", "yarn"), "tpu-inference": ("llama3",)}


def limits(head: Sizes, target: dict[str, Any]) -> list[Limit]:
    """What of this head, and of its target's config.json, a server cannot take."""
    return [*_of_the_variant(head), *_of_the_sizes(head), *_of_the_target(head, target)]


def _of_the_variant(head: Sizes) -> list[Limit]:
    custom = not is_default(head.aux_layers, head.num_target_layers)
    known = [
        (custom, f"aux layers {list(head.aux_layers)}", _PLAIN),
        (head.fc_norm, "fc_norm, which it does not read", _PLAIN),
        (head.norm_output, "norm_output, which it does not read", _PLAIN),
        (
            head.norm_before_residual,
            "norm_before_residual, which it does not read",
            ("sglang", "sglang-jax", "eagle"),
        ),
        (head.layers > 1, f"{head.layers} layers, only one", _PLAIN),
    ]
    return [Limit(what, servers) for holds, what, servers in known if holds]


def _of_the_sizes(head: Sizes) -> list[Limit]:
    heads, by_division = head.num_heads, head.hidden_size // head.num_heads
    scaling = (canonical_rope(head.rope) or {}).get("rope_type")
    known = [
        (
            head.hidden_size % heads > 0,
            f"{heads} heads at hidden_size {head.hidden_size}: transformers 5 refuses a Llama whose heads do "
            "not divide it",
            _TRANSFORMERS_5,
        ),
        (
            head.head_dim != by_division,
            f"heads of {head.head_dim}: it divides hidden_size {head.hidden_size} by {heads} heads",
            ("eagle",),
        ),
        (
            _padded(head.head_dim) != _padded(by_division),
            f"heads of {head.head_dim}: its cache is laid out for those of {by_division}",
            ("tpu-inference",),
        ),
        (scaling is not None, f"{scaling} RoPE scaling in this form", ("eagle",)),
    ]
    found = [Limit(what, servers) for holds, what, servers in known if holds]
    for server, scalings in _JAX_SCALINGS.items():
        if scaling not in (None, *scalings):
            found.append(Limit(f"{scaling} RoPE scaling", (server,)))
    return found


def _of_the_target(head: Sizes, target: dict[str, Any]) -> list[Limit]:
    kind = (target.get("architectures") or [None])[0]
    if kind is None:
        return []
    found = [
        Limit(f"a head for {kind}, whose hidden states it does not hand out", (server,))
        for server, known in _TARGETS.items()
        if kind not in known
    ]
    custom = not is_default(head.aux_layers, head.num_target_layers)
    if custom and kind in _SGLANG_GUESSES and head.aux_layers[0] != 2:
        found.append(Limit(f"aux layers that begin at {head.aux_layers[0]}, not 2, of a {kind}", ("sglang",)))
    its = target.get("head_dim") or target.get("hidden_size", 0) // target.get("num_attention_heads", 1)
    if kind in _LLAMA and _padded(its) - its != _padded(head.head_dim) - head.head_dim:
        what = f"heads of {head.head_dim}: it pads them as the target's of {its}"
        found.append(Limit(what, ("tpu-inference",)))
    return found


def _padded(head_dim: int) -> int:
    """What tpu-inference makes of it."""
    return 64 if head_dim == 64 else -(-head_dim // 128) * 128
