"""Fits L = a·C^−b + e to loss over compute, and compares compute at equal loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.differences import student_t

PAPER_RATIO = 0.519  # of Liu et al., 2502.16982, up to 1.5 B params

_DRAWS = 10_000
_GRID = 200  # number of irreducible losses to try


class PowerLaw(NamedTuple):
    """The power law L = a·C^−b + e, or many laws if `a` and `b` are arrays."""

    a: Any
    b: Any
    e: float = 0.0

    def loss(self, compute: Any) -> Any:
        return self.a * compute**-self.b + self.e

    def compute(self, loss: float) -> Any:
        """Returns the compute that reaches a loss; infinite at or below the irreducible loss."""
        if loss <= self.e:
            return math.inf
        return ((loss - self.e) / self.a) ** (-1 / self.b)


class Points(NamedTuple):
    """The compute (ascending) and mean final loss of one optimizer at each size."""

    compute: np.ndarray
    loss: np.ndarray


class Fit(NamedTuple):
    """Power laws of several optimizers, which share one irreducible loss.

    Attributes:
        laws: The laws by optimizer.
        error: Root mean square of the residuals of log L.
        gain: The AICc without an irreducible loss minus that with one; above 2, it is fitted. None
            if there are too few points.
    """

    laws: dict[str, PowerLaw]
    error: float
    gain: float | None


def fit(points: Mapping[str, Points]) -> Fit:
    """Fits by least squares in log L over log C, with an irreducible loss only if AICc prefers it.

    Args:
        points: The points of every optimizer, all at the same sizes.

    Raises:
        ValueError: If there are fewer than two sizes.
    """
    plain = {name: _line(of, 0.0) for name, of in points.items()}
    count = sum(len(of.loss) for of in points.values())
    floor = min(float(of.loss.min()) for of in points.values())
    bent = min(
        ({name: _line(of, e) for name, of in points.items()} for e in _levels(floor)),
        key=lambda laws: _squares(points, laws),
    )
    params = 2 * len(points)
    without = _aicc(count, params, _squares(points, plain))
    given = _aicc(count, params + 1, _squares(points, bent))
    gain = None if without is None or given is None else without - given
    laws = bent if gain is not None and gain > 2 else plain
    return Fit(laws, math.sqrt(_squares(points, laws) / count), gain)


def _levels(floor: float) -> np.ndarray:
    return np.linspace(0.0, floor, _GRID, endpoint=False)[1:]


def _line(of: Points, e: float) -> PowerLaw:
    if len(of.loss) < 2:
        raise ValueError("A curve requires at least two sizes.")
    slope, intercept = np.polyfit(np.log(of.compute), np.log(of.loss - e), 1)
    return PowerLaw(float(np.exp(intercept)), float(-slope), float(e))


def _residuals(of: Points, law: PowerLaw) -> np.ndarray:
    return np.log(of.loss) - np.log(law.loss(of.compute))


def _squares(points: Mapping[str, Points], laws: Mapping[str, PowerLaw]) -> float:
    return float(sum(np.sum(_residuals(of, laws[name]) ** 2) for name, of in points.items()))


def _aicc(count: int, params: int, squares: float) -> float | None:
    params += 1  # for the variance of the residuals
    if count - params < 2:
        return None
    correction = 2 * params * (params + 1) / (count - params - 1)
    return count * math.log(max(squares, 1e-300) / count) + 2 * params + correction


def ratio(laws: Mapping[str, PowerLaw], loss: float, ours: str, theirs: str) -> Any:
    """Returns the compute of `ours` over that of `theirs` at equal loss."""
    return laws[ours].compute(loss) / laws[theirs].compute(loss)


def bootstrap(points: Mapping[str, Points], found: Fit) -> dict[str, PowerLaw] | None:
    """Returns laws fitted to bootstrap samples, with `a` and `b` of shape `(draws,)`.

    Returns None with fewer than three sizes.

    Residuals are resampled by size, jointly for all optimizers, since these share seeds, text and
    shape at a size. They are scaled up for the two degrees of freedom of the fit. The irreducible
    loss is kept fixed.
    """
    sizes = min(len(of.loss) for of in points.values())
    if sizes < 3:
        return None
    draws = np.random.default_rng(0).integers(sizes, size=(sizes, _DRAWS))
    laws = {}
    for name, of in points.items():
        law = found.laws[name]
        residuals = _residuals(of, law) * math.sqrt(sizes / (sizes - 2)) * _leverage(law, of)
        drawn = np.log(law.loss(of.compute) - law.e)[:, None] + residuals[draws]
        slope, intercept = np.polyfit(np.log(of.compute), drawn, 1)
        laws[name] = PowerLaw(np.exp(intercept), -slope, law.e)
    return laws


def _leverage(law: PowerLaw, of: Points) -> np.ndarray:
    """Returns the derivative of log(L − e) with respect to log L."""
    loss = law.loss(of.compute)
    return loss / (loss - law.e)


def interval(value: float, drawn: np.ndarray, sizes: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a positive value, from its bootstrap samples.

    The interval is the samples' standard error (of the logarithm) times Student's t with two
    degrees of freedom less than sizes, since percentiles of so few residuals would be too narrow.
    """
    half = student_t(sizes - 2) * np.std(np.log(drawn))
    return float(value * np.exp(-half)), float(value * np.exp(half))


def without_each(
    points: Mapping[str, Points], statistic: Callable[[Mapping[str, PowerLaw]], float]
) -> tuple[float, float] | None:
    """Returns the smallest and largest value with one size left out; None with fewer than four."""
    sizes = min(len(of.loss) for of in points.values())
    if sizes < 4:
        return None
    values = []
    for out in range(sizes):
        kept = {n: Points(*(np.delete(part, out) for part in of)) for n, of in points.items()}
        values.append(statistic(fit(kept).laws))
    return min(values), max(values)


def overlap(points: Mapping[str, Points]) -> tuple[float, float]:
    """Returns the lowest and the highest loss of the range that all optimizers cover."""
    losses = [of.loss for of in points.values()]
    return max(float(x.min()) for x in losses), min(float(x.max()) for x in losses)
