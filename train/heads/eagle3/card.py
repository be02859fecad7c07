"""The README.md of an exported EAGLE3 head: what it is, how to serve it, how it was made."""

from collections.abc import Mapping
from typing import Any

from train.heads.eagle3 import serving
from train.heads.eagle3.sizes import Sizes
from train.serving_config import canonical_rope

_CARD = """---
tags:
- eagle3
- speculative-decoding
---
# EAGLE3 draft head for {target}

{depth} that reads {count} hidden states of {target} (h_k: the residual stream that enters layer
k; here k = {layers}) and proposes its next tokens, which the target then checks: the answers stay the
target's own, and come sooner.{variant}

| Hidden size | Heads (key/value) | Feed-forward | Draft vocabulary | RoPE |
|---|---|---|---|---|
| {hidden} | {heads} ({kv_heads}) x {head_dim} | {ffn} | {draft} of {vocab} tokens | {rope} |

## Serve it
`TARGET` is the target's name or folder, `HEAD` this folder. Three tokens a step are a fair start; more pay
off where the acceptance length is high.

```sh
# vLLM; on TPU with MODEL_IMPL_TYPE=vllm DRAFT_MODEL_IMPL_TYPE=vllm in the environment
vllm serve TARGET \\
    --speculative-config '{{"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3}}'
# SGLang; for sglang-jax on TPU put sgl_jax.launch_server for sglang.launch_server
python -m sglang.launch_server --model-path TARGET \\
    --speculative-algorithm EAGLE3 --speculative-draft-model-path HEAD \\
    --speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4
```
{limits}
## How it was made
By Eyas, from a store of the frozen target's features.
{made}
"""


def model_card(head: Sizes, metadata: Mapping[str, Any]) -> str:
    """Markdown. `metadata["target"]` names the target; every entry becomes a row of the last section."""
    scaling = canonical_rope(head.rope)
    variant = [name for name in ("fc_norm", "norm_output", "norm_before_residual") if getattr(head, name)]
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in metadata.items()]
    return _CARD.format(
        target=_cell(metadata.get("target", "its target")),
        depth=f"A stack of {head.layers} transformer blocks" if head.layers > 1 else "One transformer block",
        count=len(head.aux_layers),
        variant=f" Unlike the paper's head it has {' and '.join(variant)}." if variant else "",
        layers=", ".join(map(str, head.aux_layers)),
        hidden=head.hidden_size,
        heads=head.num_heads,
        kv_heads=head.num_kv_heads,
        head_dim=head.head_dim,
        ffn=head.ffn,
        draft=f"{head.draft_vocab_size:,}",
        vocab=f"{head.vocab_size:,}",
        rope=f"theta {head.rope_theta:g}" + (f", {scaling['rope_type']} scaling" if scaling else ""),
        limits="".join(f"\n- {limit.sentence()}.\n" for limit in serving.limits(head)),
        made="\n".join(["", "| | |", "|---|---|", *rows]) if rows else "",
    )


def _cell(value: Any) -> str:
    """One line of Markdown table text; floats with four significant digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
