"""The README.md of an exported EAGLE3 head: what it is, how to serve it, how it was made."""

from collections.abc import Mapping
from typing import Any

from train import launch, servers
from train.heads.eagle3.limits import limits
from train.heads.eagle3.sizes import METHOD, Sizes
from train.serving_config import canonical_rope

SERVED_AS = launch.Method({"method": METHOD}, METHOD.upper())

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
This folder has the layout `{layout}`. What the servers make of it, by their loaders at these versions:

| | |
|---|---|
{servers}

`TARGET` is the target's name or folder, `HEAD` this folder. Three tokens a step are a fair start; more pay
off where the acceptance length is high.

```sh
{commands}
```

## How it was made
By Eyas, from a store of the frozen target's features.
{made}
"""


def model_card(head: Sizes, metadata: Mapping[str, Any], target: dict[str, Any], layout: str) -> str:
    """Markdown. `metadata["target"]` names the target; every entry becomes a row of the last section."""
    scaling = canonical_rope(head.rope)
    found = servers.verdicts(limits(head, target), layout)
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
        layout=layout,
        servers="\n".join(
            f"| {servers.SERVERS[name].title} {servers.SERVERS[name].version} | {_cell(verdict.text())} |"
            for name, verdict in found.items()
        ),
        commands="\n".join(launch.commands(found, "TARGET", launch.Served("HEAD", layout, SERVED_AS))),
        made="\n".join(["", "| | |", "|---|---|", *rows]) if rows else "",
    )


def _cell(value: Any) -> str:
    """One line of Markdown table text; floats with four significant digits."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
