"""How much of a store the fitted start of a head looks at: dump keeps its last states, train reads them."""

import numpy as np

# Targets for each feature of the linear map. Of what the best map explains, 3 keep 70 to 90%, 16 keep 94 to
# 98%: for states of 1,024 features with spectra of i^-0.5 to i^-1.5, half or four fifths of which can be
# explained. The rest counts: a head that began with 16 accepts less after 377k tokens
# (pipelines/EXPERIMENTS.md).
_PER_FEATURE = 128
_MOST_POSITIONS = 2**19  # counted or not


def fit_rows(targets: np.ndarray, length: int, features: int) -> int:
    """How many rows of `length` tokens, the first of those with so many targets, a linear map of so many
    features is fitted to; more than there are if they are too few."""
    enough = int(np.searchsorted(np.cumsum(targets), _PER_FEATURE * features)) + 1
    return min(enough, max(1, _MOST_POSITIONS // length))
