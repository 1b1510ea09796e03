"""Two optimizers' grokking epochs: tests, the interval of their ratio, survival.

An epoch is None where a cell had not grokked within the budget: it is censored there. Cells of one
task and output function are a panel; what differs between panels says nothing of the optimizers, so
tests are made in each, and what is pooled takes a panel, not a cell, as one observation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 9999

Epochs = Mapping[int, float | None]
"""Grokking epoch by seed."""


class Ratio(NamedTuple):
    """A geometric mean of ratios of epochs, with its bootstrap interval.

    Attributes:
        value: slow over fast.
        low, high: of the interval; NaN for one observation alone.
        observations: seeds, or panels where there are several.
        bounded: cells that count at the budget, where one of the two was censored.
        untold: cells left out, where both were.
    """

    value: float
    low: float
    high: float
    observations: int
    bounded: int
    untold: int

    def times(self, factor: float) -> "Ratio":
        """Of what is that many times the epochs' ratio, as where epochs cost unlike."""
        scaled = {name: getattr(self, name) * factor for name in ("value", "low", "high")}
        return self._replace(**scaled)


class Welch(NamedTuple):
    """Welch's t test, two-sided, and the degrees of freedom it has."""

    t: float
    p: float
    degrees: float


def ratio(panels: Sequence[tuple[Epochs, Epochs]], budget: float) -> Ratio | None:
    """How many times the epochs of the fast optimizer the slow one takes, paired by cell.

    Within a panel the log ratios of the seeds are averaged; of several panels these means are drawn
    again with replacement, of one panel its seeds.

    Args:
        panels: epochs of the slow and of the fast optimizer, a pair for each panel.
        budget: what a censored epoch exceeds, and counts as.

    Returns:
        None where no cell tells anything.

    Example:
        >>> found = ratio([({0: 40, 1: 80}, {0: 20, 1: 20})], budget=100)
        >>> round(found.value, 3), found.observations
        (2.828, 2)
    """
    logs: list[list[float]] = []
    bounded = untold = 0
    for slow, fast in panels:
        own = []
        for seed in sorted(slow.keys() & fast.keys()):
            pair = slow[seed], fast[seed]
            untold += pair == (None, None)
            if pair != (None, None):
                bounded += None in pair
                over, under = (budget if epoch is None else epoch for epoch in pair)
                own.append(math.log(over / under))
        logs += [own] if own else []
    if not logs:
        return None
    drawn = [float(np.mean(own)) for own in logs] if len(logs) > 1 else logs[0]
    center, low, high = float(np.mean(drawn)), math.nan, math.nan
    if len(drawn) > 1:
        found = stats.bootstrap(
            (drawn,),
            np.mean,
            n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = found.confidence_interval
    return Ratio(math.exp(center), math.exp(low), math.exp(high), len(drawn), bounded, untold)


def mann_whitney(slow: Epochs, fast: Epochs) -> float | None:
    """Two-sided p that the epochs of a panel have one distribution; censored ones rank last.

    Example:
        >>> mann_whitney({0: 40, 1: 50, 2: None}, {0: 9, 1: 10, 2: 11})
        0.1
    """
    if not (slow and fast):
        return None
    over, under = ([math.inf if e is None else e for e in of.values()] for of in (slow, fast))
    tied = len({*over, *under}) < len(over) + len(under)
    found = stats.mannwhitneyu(over, under, method="asymptotic" if tied else "exact")
    return None if math.isnan(found.pvalue) else float(found.pvalue)


def welch(slow: Sequence[float | None], fast: Sequence[float | None]) -> Welch | None:
    """As the published study tests: over all cells that grokked, whatever their panel.

    That takes tasks for repetitions and leaves censored cells out, which flatters the slower
    optimizer; it is there to be compared with the paper, and for nothing else.
    """
    grokked = [[epoch for epoch in of if epoch is not None] for of in (slow, fast)]
    if min(map(len, grokked)) < 2:
        return None
    found = stats.ttest_ind(*grokked, equal_var=False)
    return None if math.isnan(found.pvalue) else Welch(*map(float, (*found, found.df)))


def log_rank(
    slow: Sequence[float | None], fast: Sequence[float | None], budget: float
) -> float | None:
    """Two-sided p that both have one survival curve; None where no cell of theirs grokked."""
    if not (slow and fast) or all(epoch is None for epoch in (*slow, *fast)):
        return None
    found = stats.logrank(_censored(slow, budget), _censored(fast, budget))
    return None if math.isnan(found.pvalue) else float(found.pvalue)


def survival(epochs: Sequence[float | None], budget: float) -> tuple[list[float], list[float]]:
    """Kaplan and Meier's curve: the share that has not grokked, from epoch 0 to the budget.

    Example:
        >>> survival([10, 20, None, 20], budget=50)
        ([0.0, 10.0, 20.0, 50.0], [1.0, 0.75, 0.25, 0.25])
    """
    found = stats.ecdf(_censored(epochs, budget)).sf
    grokked = found.quantiles <= max((e for e in epochs if e is not None), default=-1)
    times = [0.0, *map(float, found.quantiles[grokked])]
    shares = [1.0, *map(float, found.probabilities[grokked])]
    return [*times, float(budget)], [*shares, shares[-1]]


def _censored(epochs: Sequence[float | None], budget: float) -> stats.CensoredData:
    times = [budget if epoch is None else epoch for epoch in epochs]
    return stats.CensoredData.right_censored(times, [epoch is None for epoch in epochs])
