"""Loss against compute: L = a·C^−b + e for each optimizer, and compute ratios at equal loss."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.differences import student_t

# Liu et al., 2502.16982: L = a·C^−b with C in PFLOP/s-days, up to 1.5 B params.
PAPER = {"muon": (2.506, 0.052), "adamw": (2.608, 0.054)}
PAPER_RATIO = 0.519

_DRAWS = 10_000
_GRID = 200  # irreducible losses that are tried


class PowerLaw(NamedTuple):
    """L = a·C^−b + e; `a` and `b` may be arrays, of many laws."""

    a: Any
    b: Any
    e: float = 0.0

    def loss(self, compute: Any) -> Any:
        return self.a * compute**-self.b + self.e

    def compute(self, loss: float) -> Any:
        """That reaches the loss; infinite at and below the irreducible one."""
        if loss <= self.e:
            return math.inf
        return ((loss - self.e) / self.a) ** (-1 / self.b)


class Points(NamedTuple):
    """Of one optimizer, by size: compute ascending, and mean final loss."""

    compute: np.ndarray
    loss: np.ndarray


class Fit(NamedTuple):
    """Power laws of several optimizers, with one irreducible loss for all.

    Attributes:
        laws: by optimizer.
        error: root mean square of the residuals of log L.
        gain: by how much AICc prefers an irreducible loss; it is fitted where that is above 2, and
            None where there are too few points to tell.
    """

    laws: dict[str, PowerLaw]
    error: float
    gain: float | None


def fit(points: Mapping[str, Points]) -> Fit:
    """Least squares in log L over log C; an irreducible loss only where the data ask for one.

    Args:
        points: of every optimizer, all at the same sizes.

    Raises:
        ValueError: fewer than two sizes.
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
    params += 1  # the residuals' variance
    if count - params < 2:
        return None
    correction = 2 * params * (params + 1) / (count - params - 1)
    return count * math.log(max(squares, 1e-300) / count) + 2 * params + correction


def ratio(laws: Mapping[str, PowerLaw], loss: float, ours: str, theirs: str) -> Any:
    """Compute of ours over theirs, both at this loss."""
    return laws[ours].compute(loss) / laws[theirs].compute(loss)


def bootstrap(points: Mapping[str, Points], found: Fit) -> dict[str, PowerLaw] | None:
    """Laws of drawn data, to take intervals from: `a` and `b` are `(draws,)`.

    None with fewer than three sizes.

    Residuals of whole sizes are drawn, those of all optimizers at a size together, since they
    share seeds, text and shape; they are enlarged by what two fitted numbers took from them. The
    irreducible loss stays what it is.
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
    """What a small change of log L is in log(L − e)."""
    loss = law.loss(of.compute)
    return loss / (loss - law.e)


def interval(value: float, drawn: np.ndarray, sizes: int) -> tuple[float, float]:
    """Confidence interval of a positive value, from what it is of drawn data.

    The draws give its standard error; Student's t, with the sizes but two as degrees of freedom,
    says how many of them, since from so few residuals percentiles would promise too much.
    """
    half = student_t(sizes - 2) * np.std(np.log(drawn))
    return float(value * np.exp(-half)), float(value * np.exp(half))


def without_each(
    points: Mapping[str, Points], statistic: Callable[[Mapping[str, PowerLaw]], float]
) -> tuple[float, float] | None:
    """Smallest and largest value when one size is left out; None with fewer than four."""
    sizes = min(len(of.loss) for of in points.values())
    if sizes < 4:
        return None
    values = []
    for out in range(sizes):
        kept = {n: Points(*(np.delete(part, out) for part in of)) for n, of in points.items()}
        values.append(statistic(fit(kept).laws))
    return min(values), max(values)


def paper_ratio(compute: float) -> float:
    """Muon's compute over AdamW's at equal loss by the paper's curves, at AdamW's compute.

    >>> round(paper_ratio(10.0), 2), round(paper_ratio(1.0), 2)
    (0.51, 0.46)
    """
    laws = {name: PowerLaw(*law) for name, law in PAPER.items()}
    return laws["muon"].compute(float(laws["adamw"].loss(compute))) / compute


def overlap(points: Mapping[str, Points]) -> tuple[float, float]:
    """The losses, lowest and highest, that all optimizers have seen."""
    losses = [of.loss for of in points.values()]
    return max(float(x.min()) for x in losses), min(float(x.max()) for x in losses)
