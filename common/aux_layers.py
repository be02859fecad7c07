"""Which of a target's states a draft head reads when nobody says.

h_k is the residual stream that enters layer k (0-based), of a target of n layers.
"""

from common.errors import EyasError


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """(2, n // 2, n - 3): the aux states that every server assumes. EyasError when n < 7."""
    if num_layers < 7:
        raise EyasError(
            f"the target has {num_layers} layers; the default aux layers need at least 7: give aux_layers"
        )
    return 2, num_layers // 2, num_layers - 3


def is_default(aux_layers: tuple[int, ...], num_layers: int) -> bool:
    """Whether servers capture these when config.json names none."""
    return num_layers >= 7 and aux_layers == default_aux_layers(num_layers)
