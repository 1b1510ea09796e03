"""Statistics of two optimizers' grokking epochs: ratios with intervals, tests and survival.

An epoch is None if a cell has not grokked within the budget; the cell is then censored. Cells of
one task and output function form a panel. Differences between tasks say nothing about the
optimizers, and panels of one task are not independent repetitions. Therefore the observations are
tasks if there are several, otherwise panels if there are several, otherwise seeds.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from experiments.differences import student_t

_RESAMPLES = 9999
_POWER = 0.8
# With fewer observations, no signed-rank p value can be below 0.05.
_FEWEST = 6

Epochs = Mapping[int, float | None]
"""Grokking epochs by seed."""


class Ratio(NamedTuple):
    """A geometric mean of ratios of epochs, with its 95 % interval.

    Attributes:
        value: The mean of the slow optimizer's epochs over the fast one's.
        low, high: The ends of the interval; NaN for a single observation.
        observations: The number of observations, which are seeds, panels or tasks.
        deviation: The standard deviation of their logarithms; NaN for a single observation.
        at_least: The number of censored cells of the slow optimizer, which count at the budget.
        at_most: The number of censored cells of the fast optimizer, which count at the budget.
        untold: The number of pairs that are excluded, since both cells are censored.
    """

    value: float
    low: float
    high: float
    observations: int
    deviation: float
    at_least: int
    at_most: int
    untold: int

    def __str__(self) -> str:
        """Returns the value, marked as a bound if censored cells count at the budget."""
        signs = {(True, False): "≥ ", (False, True): "≤ "}
        both = " (bounds)" if self.at_least and self.at_most else ""
        return signs.get((self.at_least > 0, self.at_most > 0), "") + f"{self.value:.2f}{both}"

    @property
    def text(self) -> str:
        """The value with its interval, such as "≥ 2.48 [1.99, 3.08]"."""
        if math.isnan(self.low):
            return str(self)
        high = f"{self.high:.2f}" if self.high < 1000 else "> 1000"
        return f"{self} [{self.low:.2f}, {high}]"

    @property
    def bounded(self) -> int:
        """The number of pairs of which one cell counts at the budget."""
        return self.at_least + self.at_most


def ratio(
    panels: Sequence[tuple[Epochs, Epochs]],
    budget: float,
    tasks: Sequence[Hashable] | None = None,
) -> Ratio | None:
    """Returns the ratio of the slow optimizer's epochs to the fast one's, paired by cell.

    Log ratios are averaged over the seeds of each panel and over the panels of each task. The
    module's docstring says which of these are the observations. The interval is Student's t.

    Args:
        panels: The epochs of the slow and of the fast optimizer, for each panel.
        budget: The number of epochs that a censored epoch exceeds, and as which it counts.
        tasks: The task of each panel. By default every panel has its own.

    Returns:
        The ratio, or None if no pair has an uncensored cell.

    Example:
        >>> found = ratio([({0: 40, 1: 80}, {0: 20, 1: 20})], budget=100)
        >>> round(found.value, 3), found.observations
        (2.828, 2)
    """
    logs, counted = _observations(panels, budget, tasks)
    if not logs:
        return None
    n, center, deviation, half = len(logs), float(np.mean(logs)), math.nan, math.nan
    if n > 1:
        deviation = float(np.std(logs, ddof=1))
        half = student_t(n - 1) * deviation / n**0.5
    low, high = math.exp(center - half), math.exp(center + half)
    return Ratio(math.exp(center), low, high, n, deviation, *counted)


def signed_rank(
    panels: Sequence[tuple[Epochs, Epochs]],
    budget: float,
    tasks: Sequence[Hashable] | None = None,
) -> float | None:
    """Returns the two-sided p value of Wilcoxon's signed-rank test of the log ratios of `ratio`.

    None with fewer than six observations.

    Example:
        >>> signed_rank([({0: 40 + i}, {0: 20}) for i in range(6)], budget=100)
        0.03125
    """
    logs, _ = _observations(panels, budget, tasks)
    if len(logs) < _FEWEST or not any(logs):
        return None
    return float(stats.wilcoxon(logs).pvalue)


def detectable(deviation: float, observations: int) -> float:
    """Returns the smallest true ratio that a paired t test at p < 0.05 finds in 80 % of studies.

    Args:
        deviation: The standard deviation of the logarithms of the ratios.
        observations: The number of ratios.

    Example:
        >>> [round(detectable(0.2, n), 2) for n in (3, 10)]
        [1.92, 1.22]
    """
    if observations < 2 or math.isnan(deviation):
        return math.nan
    degrees, error = observations - 1, max(deviation, 1e-12) / observations**0.5
    critical = student_t(degrees)

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, degrees, shift)) - _POWER

    return math.exp(error * float(optimize.brentq(lacking, 0, 100)))


def _observations(
    panels: Sequence[tuple[Epochs, Epochs]], budget: float, tasks: Sequence[Hashable] | None
) -> tuple[list[float], tuple[int, int, int]]:
    """Returns the log ratio of each observation, and the last three fields of a `Ratio`."""
    logs: dict[Hashable, dict[int, list[float]]] = {}
    at_least = at_most = untold = 0
    for place, (slow, fast) in enumerate(panels):
        for seed in sorted(slow.keys() & fast.keys()):
            pair = slow[seed], fast[seed]
            if pair == (None, None):
                untold += 1
                continue
            at_least += pair[0] is None
            at_most += pair[1] is None
            over, under = (budget if epoch is None else epoch for epoch in pair)
            task = logs.setdefault(tasks[place] if tasks else place, {})
            task.setdefault(place, []).append(math.log(over / under))
    by_panel = [[float(np.mean(seeds)) for seeds in task.values()] for task in logs.values()]
    counted = at_least, at_most, untold
    if len(by_panel) > 1:
        return [float(np.mean(means)) for means in by_panel], counted
    seeds = [x for task in logs.values() for own in task.values() for x in own]
    return (by_panel[0] if by_panel and len(by_panel[0]) > 1 else seeds), counted


def mann_whitney(slow: Epochs, fast: Epochs) -> float | None:
    """Returns the two-sided Mann-Whitney p value of a panel. Censored epochs rank last.

    It comes from permutations, since epochs have ties, so with three cells each it is at least 0.1.
    None with fewer than two cells of either optimizer, or if all epochs are equal.

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


def welch(slow: Sequence[float | None], fast: Sequence[float | None]) -> Any:
    """Returns SciPy's result of the published study's test, over all cells that grokked.

    It treats tasks as repetitions and excludes censored cells, which favours the slower optimizer.
    It only serves to compare a run with the paper. None with fewer than two cells.
    """
    grokked = [[epoch for epoch in of if epoch is not None] for of in (slow, fast)]
    if min(map(len, grokked)) < 2:
        return None
    found = stats.ttest_ind(*grokked, equal_var=False)
    return None if math.isnan(found.pvalue) else found


def log_rank(
    slow: Sequence[float | None], fast: Sequence[float | None], budget: float
) -> float | None:
    """Returns the two-sided p value of the log-rank test, or None if no cell grokked."""
    if not (slow and fast) or all(epoch is None for epoch in (*slow, *fast)):
        return None
    found = stats.logrank(_censored(slow, budget), _censored(fast, budget))
    return None if math.isnan(found.pvalue) else float(found.pvalue)


def survival(epochs: Sequence[float | None], budget: float) -> tuple[list[float], list[float]]:
    """Returns the Kaplan-Meier curve: epochs from 0 to the budget, and fractions not grokked.

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
