"""Whether two arms differ: paired over seeds, Student's t, and Holm's correction for many arms."""

import functools
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import jax

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean of paired differences and its Student-t confidence interval."""

    mean: float
    low: float
    high: float


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Our loss minus theirs over the seeds that both have; None with fewer than two."""
    pairs = _pairs(ours, theirs)
    if pairs is None:
        return None
    center = statistics.fmean(pairs)
    half = student_t(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Interval(center, center - half, center + half)


def p_value(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Two-sided, of the paired t test over the seeds that both have; None with fewer than two."""
    pairs = _pairs(ours, theirs)
    if pairs is None:
        return None
    center, error = statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    if error == 0:
        return 1.0 if center == 0 else 0.0
    return _beyond(abs(center) / error, len(pairs) - 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: each p value such that all of them may be read together.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min((len(p_values) - place) * p_values[name], 1.0))
        corrected[name] = largest
    return corrected


@functools.cache
def student_t(degrees: int, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided confidence interval reaches.

    >>> round(student_t(2), 2)
    4.3
    """
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _beyond(middle, degrees) < 1 - confidence else (middle, high)
    return low


def _beyond(t: float, degrees: int) -> float:
    """Probability of a larger absolute t."""
    return float(jax.scipy.special.betainc(degrees / 2, 0.5, degrees / (degrees + t**2)))


def _pairs(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float] | None:
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return pairs if len(pairs) > 1 and all(map(math.isfinite, pairs)) else None
