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

from experiments.differences import student_t

CONFIDENCE = 0.95
_RESAMPLES = 9999
# Of fewer observations the bootstrap's interval is too short: of three it holds the mean in 75 %.
_MANY = 10
# Of fewer panels no signed-rank p can be below 0.05.
_PANELS = 6

Epochs = Mapping[int, float | None]
"""Grokking epoch by seed."""


class Ratio(NamedTuple):
    """A geometric mean of ratios of epochs, with its 95 % interval.

    Attributes:
        value: slow over fast.
        low, high: of the interval; NaN for one observation alone.
        observations: seeds, or panels where there are several.
        at_least: cells of the slow one that count at the budget, as they are censored.
        at_most: such cells of the fast one.
        untold: cells left out, where both are.
    """

    value: float
    low: float
    high: float
    observations: int
    at_least: int
    at_most: int
    untold: int

    def __str__(self) -> str:
        """The value, and what is known of the true one where censored cells count."""
        signs = {(True, False): "≥ ", (False, True): "≤ "}
        both = " (bounds)" if self.at_least and self.at_most else ""
        return signs.get((self.at_least > 0, self.at_most > 0), "") + f"{self.value:.2f}{both}"

    @property
    def bounded(self) -> int:
        """Pairs of cells of which one counts at the budget."""
        return self.at_least + self.at_most


class Welch(NamedTuple):
    """Welch's t test, two-sided, and the degrees of freedom it has."""

    t: float
    p: float
    degrees: float


def ratio(panels: Sequence[tuple[Epochs, Epochs]], budget: float) -> Ratio | None:
    """How many times the epochs of the fast optimizer the slow one takes, paired by cell.

    Within a panel the log ratios of the seeds are averaged; of several panels these means are the
    observations, of one panel its seeds. The interval is a percentile bootstrap's of ten and more
    observations, and Student's of fewer.

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
    logs, counted = _logs(panels, budget)
    if not logs:
        return None
    drawn = np.array([np.mean(own) for own in logs] if len(logs) > 1 else logs[0])
    center, low, high = float(drawn.mean()), math.nan, math.nan
    if len(drawn) >= _MANY:
        found = stats.bootstrap(
            (drawn,),
            np.mean,
            n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = found.confidence_interval
    elif len(drawn) > 1:
        half = student_t(len(drawn) - 1, CONFIDENCE) * float(drawn.std(ddof=1)) / len(drawn) ** 0.5
        low, high = center - half, center + half
    return Ratio(math.exp(center), math.exp(low), math.exp(high), len(drawn), *counted)


def signed_rank(panels: Sequence[tuple[Epochs, Epochs]], budget: float) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test that the log ratios of panels center at 0.

    Args:
        panels, budget: as `ratio` takes them; None with fewer than six panels that tell anything.

    Example:
        >>> signed_rank([({0: 40 + i}, {0: 20}) for i in range(6)], budget=100)
        0.03125
    """
    logs, _ = _logs(panels, budget)
    means = [float(np.mean(own)) for own in logs]
    if len(means) < _PANELS or not any(means):
        return None
    return float(stats.wilcoxon(means).pvalue)


def _logs(
    panels: Sequence[tuple[Epochs, Epochs]], budget: float
) -> tuple[list[list[float]], tuple[int, int, int]]:
    """The log ratios of each panel that tells any, and the last three fields of a `Ratio`."""
    logs: list[list[float]] = []
    at_least = at_most = untold = 0
    for slow, fast in panels:
        own = []
        for seed in sorted(slow.keys() & fast.keys()):
            pair = slow[seed], fast[seed]
            untold += pair == (None, None)
            if pair != (None, None):
                at_least += pair[0] is None
                at_most += pair[1] is None
                over, under = (budget if epoch is None else epoch for epoch in pair)
                own.append(math.log(over / under))
        logs += [own] if own else []
    return logs, (at_least, at_most, untold)


def mann_whitney(slow: Epochs, fast: Epochs) -> float | None:
    """Two-sided p that the epochs of a panel have one distribution; censored ones rank last.

    It is that of permutations, ties and all, so that of three cells against three it is 0.1 at
    least; None with fewer than two on either side, or where all are equal.

    Example:
        >>> mann_whitney({0: 40, 1: 50, 2: None}, {0: 9, 1: 10, 2: 10})
        0.1
    """
    if min(len(slow), len(fast)) < 2:
        return None
    over, under = ([math.inf if e is None else e for e in of.values()] for of in (slow, fast))
    if len({*over, *under}) == 1:
        return None
    ranks = stats.rankdata([*over, *under])
    permuted = stats.PermutationMethod(n_resamples=_RESAMPLES, rng=np.random.default_rng(0))
    found = stats.mannwhitneyu(ranks[: len(over)], ranks[len(over) :], method=permuted)
    return float(found.pvalue)


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
