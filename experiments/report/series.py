"""Records as series: the values of a key against steps, and what several have in common."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Series = tuple[np.ndarray, np.ndarray]
"""Places, ascending, and the values there; NaN where one is not known or not finite."""

NOTHING: Series = (np.empty(0), np.empty(0))


def series(records: Iterable[Mapping[str, Any]], *path: str, at: str = "step") -> Series:
    """The values of a key, or of one in another."""

    def value(record: Any) -> float | None:
        for key in path:
            record = record.get(key) if record else None
        return record

    records = list(records)
    return np.array([record[at] for record in records]), array(map(value, records))


def array(values: Iterable[float | None]) -> np.ndarray:
    """Numbers, NaN for None."""
    return np.array([math.nan if x is None else x for x in values], float)


def middle(found: Sequence[Series], statistic: Callable[[list[float]], Any] = np.mean) -> Series:
    """The mean, or another statistic, of several series at the places that all of them have.

    Beyond those it would be of whichever went on, which are no fair sample.
    """
    if not found:
        return NOTHING
    rows = [dict(zip(np.asarray(x).tolist(), values, strict=True)) for x, values in found]
    places = sorted(set.intersection(*map(set, rows)))
    return np.array(places), np.array([statistic([row[x] for row in rows]) for x in places])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over the 6 % of the records about each, over fewer where the curve is steep."""
    reach = round(0.03 * len(values))
    means = np.array(values)
    for i in np.flatnonzero(np.isfinite(values)):
        near = min(i // 4, reach)
        means[i] = np.nanmean(values[i - near : i + near + 1])
    return means
