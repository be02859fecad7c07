"""Dividing numbers of rows and tokens into equal parts."""

import math


def largest_divisor(whole: int, limit: int) -> int:
    """The largest divisor of `whole` that is at most `limit`, at least 1."""
    small = (n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0)
    return max((part for n in small for part in (n, whole // n) if part <= limit), default=1)
