"""What a few seeds say of all seeds: the mean and its 95% interval."""

import math
from collections.abc import Sequence
from functools import lru_cache

from nsa.eval.scoring import mean_and_error


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% t-interval over independent seeds; NaN ends of fewer than two.

    Of three seeds the interval is 2.5 standard deviations to each side: so little do three say. The lowest and the
    highest of them are no interval of the mean, and a standard error of three covers it in 58% of cases.
    """
    mean, error = mean_and_error(values)
    half = student(len(values) - 1) * error if len(values) > 1 else math.nan
    return mean, mean - half, mean + half


@lru_cache
def student(freedom: int) -> float:
    """t such that Student's distribution of so many degrees of freedom has 95% of its mass between -t and t."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mass(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _mass(angle: float, freedom: int) -> float:
    """That between -t and t for tan(angle) = t / sqrt(freedom), a finite sum.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    cos, odd = math.cos(angle), freedom % 2
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cos * cos * (i - 1) / i
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
