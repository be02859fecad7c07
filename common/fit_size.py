"""How much of a store the fitted start of a head looks at: dump keeps its last states, train reads them."""

# For each feature of the linear map. Of what the best map explains, 3 keep 70 to 90%, 16 keep 94 to 98%: for
# states of 1,024 features with spectra of i^-0.5 to i^-1.5, half or four fifths of which can be explained.
# The rest counts: a head that began with 16 accepts less after 377k tokens (pipelines/EXPERIMENTS.md).
_PER_FEATURE = 128
MOST_POSITIONS = 2**19


def fit_positions(features: int) -> int:
    """How many positions are wanted for a linear map of so many features."""
    return min(_PER_FEATURE * features, MOST_POSITIONS)
