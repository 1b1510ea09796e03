"""Compares arms: differences paired by seed, Student's t test, and Holm's correction."""

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """A mean of paired differences and its Student-t confidence interval."""

    mean: float
    low: float
    high: float


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Returns the mean of our loss minus theirs over common seeds; None with fewer than two."""
    pairs = _pairs(ours, theirs)
    if pairs is None:
        return None
    center = statistics.fmean(pairs)
    half = student_t(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Interval(center, center - half, center + half)


def p_value(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Returns the two-sided p value of the paired t test; None with fewer than two common seeds."""
    pairs = _pairs(ours, theirs)
    if pairs is None:
        return None
    if not any(pairs):
        return 1.0
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    t = abs(statistics.fmean(pairs)) / error if error else math.inf
    return float(2 * stats.t.sf(t, len(pairs) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns p values corrected for multiple comparisons by Holm's step-down procedure.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min((len(p_values) - place) * p_values[name], 1.0))
        corrected[name] = largest
    return corrected


def student_t(degrees: int) -> float:
    """Returns the half-width of a two-sided 95 % confidence interval, in standard errors.

    >>> round(student_t(2), 2)
    4.3
    """
    return float(stats.t.ppf(0.975, degrees))


def _pairs(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float] | None:
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return pairs if len(pairs) > 1 and all(map(math.isfinite, pairs)) else None
