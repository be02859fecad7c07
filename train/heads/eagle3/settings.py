"""What can be chosen about an EAGLE3 head."""

from dataclasses import dataclass

from common.config import setting

MOST_LAYERS = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """See sizes.py for what they mean."""

    layers: int = setting(1, "Transformer layers of the head.", least=1, most=MOST_LAYERS)
    fc_norm: bool = setting(False, "EAGLE3.1: norm each aux state before they are joined.")
    norm_output: bool = setting(False, "EAGLE3.1: feed the normed state to the next step.")
    norm_before_residual: bool = setting(False, "Add the first layer's results to the normed state.")
    lm_head: str = setting(
        "own",
        "The head's output: trained (own), or kept as the target's lm_head (frozen) or embedding (tied).",
        choices=("own", "frozen", "tied"),
    )
    num_kv_heads: int | None = setting(
        None,
        "Heads of keys and values. A token reaches what the head adds through their values alone, at a rank "
        "of that many times a head's size.",
        least=1,
        otherwise="the target's",
    )
    ffn: int | None = setting(
        None, "Width of the head's feed-forward part.", least=1, otherwise="the target's"
    )
