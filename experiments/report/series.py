"""Series of values against steps, read from records, and the mean of several series."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Series = tuple[np.ndarray, np.ndarray]
"""Ascending steps and the values at them. NaN marks values that are missing or not finite."""

NOTHING: Series = (np.empty(0), np.empty(0))


def series(records: Iterable[Mapping[str, Any]], *path: str, at: str = "step") -> Series:
    """Returns the series of a key, or of nested keys, in records. `at` is the key of the step."""

    def value(record: Any) -> float | None:
        for key in path:
            record = record.get(key) if record else None
        return record

    records = list(records)
    return np.array([record[at] for record in records]), array(map(value, records))


def array(values: Iterable[float | None]) -> np.ndarray:
    """Returns numbers as an array, with NaN for None."""
    return np.array([math.nan if x is None else x for x in values], float)


def middle(found: Sequence[Series], statistic: Callable[[list[float]], Any] = np.mean) -> Series:
    """Returns the mean, or another statistic, of several series at the steps that all have.

    At later steps the trainings that had not ended yet would be a biased sample.
    """
    if not found:
        return NOTHING
    rows = [dict(zip(np.asarray(x).tolist(), values, strict=True)) for x, values in found]
    places = sorted(set.intersection(*map(set, rows)))
    return np.array(places), np.array([statistic([row[x] for row in rows]) for x in places])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns a moving average over 6 % of the records, and over fewer near the steep start."""
    reach = round(0.03 * len(values))
    means = np.array(values)
    for i in np.flatnonzero(np.isfinite(values)):
        near = min(i // 4, reach)
        means[i] = np.nanmean(values[i - near : i + near + 1])
    return means
