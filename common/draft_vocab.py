"""The draft vocabulary: the tokens that the target's answers are mostly made of."""

import numpy as np

from common.errors import EyasError


def most_frequent(token_counts: np.ndarray, n: int) -> np.ndarray:
    """int32 [n] ids, ascending, of the most frequent tokens; among equals the lower id is chosen.

    `token_counts` int64 [V] (see Store.token_counts). EyasError if n is not in 1..V.
    """
    if not 1 <= n <= len(token_counts):
        raise EyasError(f"a draft vocabulary of {n} tokens; the target has {len(token_counts)}: give fewer")
    return np.sort(np.argsort(-token_counts, kind="stable")[:n]).astype(np.int32)
