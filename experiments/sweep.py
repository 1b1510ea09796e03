"""Which cells a sweep of learning rates wants next, and what it found.

An arm is anything whose rate is swept: an optimizer, or a width with a shape scale. Its losses are
those of finished cells, infinite where one diverged.
"""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np

from experiments import sealed
from experiments.commands import print_warning
from experiments.runs import finished_pieces, read_json, read_settings
from experiments.settings import Count, Whole, above, check

Row = dict[str, Any]
Cell = TypeVar("Cell", bound=tuple)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which learning rates an optimizer is tried at."""

    factor: Annotated[float, above(1)] = 2.0
    """Ratio of neighbouring learning rates."""
    reach: Whole = 1
    """Learning rates to try on either side of the default one."""
    limit: Whole = 4
    """Further learning rates at most, on a side whose outermost one is the best so far."""


@dataclasses.dataclass(frozen=True)
class Seeded:
    """How many trainings each arm of a suite has."""

    seeds: Count = 3
    """Number of random seeds. In a suite they train at the best learning rate. A seed sets the
    order of the training data and, in pretraining, the initial parameters."""
    sweep_seeds: Count = 1
    """Number of seeds that choose the best learning rate. Of a suite; at most --seeds, and the
    others train at that rate alone."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to try."""

    def __post_init__(self) -> None:
        check(self)
        if self.sweep_seeds > self.seeds:
            raise ValueError(
                f"--sweep-seeds must be at most --seeds {self.seeds}; got {self.sweep_seeds}."
            )


class Best(NamedTuple):
    """An arm's best rate.

    Attributes:
        rate: with the lowest mean loss.
        losses: there, by seed.
        at_edge: whether no higher, or no lower, rate was tried.
    """

    rate: float
    losses: dict[int, float]
    at_edge: bool

    @property
    def mean(self) -> float:
        """The mean loss."""
        return mean(self.losses)


def loss_of(row: Row) -> float:
    """A cell's final validation loss, infinite if it diverged."""
    return math.inf if row["diverged"] else row["validation_loss"]


def losses_by_rate(rows: Iterable[Row]) -> dict[float, dict[int, float]]:
    """An arm's losses by rate, ascending, and seed; only the rates with most seeds finished."""
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        losses[row["rate"]][row["seed"]] = loss_of(row)
    most = max(map(len, losses.values()), default=0)
    return {rate: losses[rate] for rate in sorted(losses) if len(losses[rate]) == most}


def mean(losses: Mapping[int, float]) -> float:
    """The mean over seeds."""
    return statistics.fmean(losses.values())


def best(rows: Sequence[Row], swept: int | None = None) -> Best | None:
    """The best rate among an arm's rows, None without any.

    Args:
        rows: of the arm.
        swept: how many seeds choose the rate; by default all. The losses there are of all.
    """
    losses = losses_by_rate(chosen_by(rows, swept))
    if not losses:
        return None
    rates = list(losses)
    rate = min(rates, key=lambda rate: mean(losses[rate]))
    own = {row["seed"]: loss_of(row) for row in rows if row["rate"] == rate}
    return Best(rate, own, rate in (rates[0], rates[-1]))


def chosen_by(rows: Iterable[Row], swept: int | None) -> list[Row]:
    """Those rows whose seeds choose the rate."""
    return [row for row in rows if swept is None or row["seed"] < swept]


def optimum(losses: dict[float, float], top: float) -> float:
    """Between the rates: where a parabola in log(rate) through three of them has its lowest point.

    At an edge, or beside a rate that diverged, it is the best rate itself.
    """
    rates = list(losses)
    place = rates.index(top)
    near = rates[max(place - 1, 0) : place + 2]
    values = [losses[rate] for rate in near]
    if len(near) < 3 or top != near[1] or not all(map(math.isfinite, values)):
        return top
    a, b, _ = np.polyfit(np.log2(near) - np.log2(top), values, 2)
    return float(top * 2 ** (-b / (2 * a))) if a > 0 else top


def wanted_rates(default: float, mean_losses: Mapping[float, float], sweep: Sweep) -> list[float]:
    """The rates that an arm is to be tried at, the default first.

    Args:
        default: the middle of the grid.
        mean_losses: by rate, of the rates that are done.
        sweep: the grid, and how far it may grow where the best rate is its last.
    """
    low, high = -sweep.reach, sweep.reach
    while True:
        rates = [rate_at(default, sweep.factor, notch) for notch in range(low, high + 1)]
        if all(rate in mean_losses for rate in rates):
            top = min(rates, key=lambda rate: mean_losses[rate])
            if top == rates[0] and -low < sweep.reach + sweep.limit:
                low -= 1
                continue
            if top == rates[-1] and high < sweep.reach + sweep.limit:
                high += 1
                continue
        return sorted(rates, key=lambda rate: abs(math.log(rate / default)))


def rate_at(default: float, factor: float, notch: int) -> float:
    """A rate of the grid, to four digits, so that it is the same number wherever it is written."""
    return float(f"{default * factor**notch:.4g}")


def missing_cells(
    rows: Sequence[Row],
    make: Callable[..., Cell],
    arms: Mapping[tuple[Hashable, ...], float],
    seeds: int,
    sweep: Sweep,
    swept: int | None = None,
) -> list[Cell]:
    """The cells that are still to be trained, as far as the finished ones tell.

    Args:
        rows: of the finished cells.
        make: the cell's class, whose fields are the arm's, the rate and the seed.
        arms: default rate by the arm's fields.
        seeds: of every rate, or of the best one.
        sweep: which rates.
        swept: how many seeds every rate gets; by default all. The others see the best rate alone,
            once it is known.

    Returns:
        Cells, seeds outermost and arms innermost: every arm has a first result early, and arms take
        turns on a machine that is now quiet and now not.
    """
    finished = {cell_of(make, row) for row in rows}
    trying = seeds if swept is None else min(swept, seeds)
    turns: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for arm, default in arms.items():
        own = [row for row in rows if cell_of(make, row)[:-2] == arm and row["seed"] < trying]
        done = {
            rate: mean(losses)
            for rate, losses in losses_by_rate(own).items()
            if len(losses) == trying
        }
        rates = wanted_rates(default, done, sweep)
        known = all(rate in done for rate in rates)
        confirmed = [min(rates, key=lambda rate: done[rate])] if known else []
        for seed in range(seeds):
            for place, rate in enumerate(rates if seed < trying else confirmed):
                turns[seed, place].append(make(*arm, rate, seed))
    return [cell for turn in sorted(turns) for cell in turns[turn] if cell not in finished]


def cell_of(make: Callable[..., Cell], row: Row) -> Cell:
    """The cell that a row of the log is of."""
    return make(*(row[field] for field in make._fields))


class Files(NamedTuple):
    """A run's files; `histories` are the evaluations of each finished cell, beside its row."""

    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row]
    histories: list[list[Row]]
    costs: dict[str, dict[str, float]]


def load_run(folder: Path) -> Files:
    """Reads the files of a finished or partly finished run.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    for name in ("config.json", "summary.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}. Has a training of the run finished?")
    log = sealed.read(folder / "metrics.jsonl")
    for damage in log.damage:
        print_warning(f"{folder / 'metrics.jsonl'} is damaged: {damage}.")
    pieces = finished_pieces(log)
    costs = folder / "costs.json"
    return Files(
        read_settings(folder / "config.json"),
        read_json(folder / "summary.json"),
        [row for _, row in pieces],
        [records for records, _ in pieces],
        read_json(costs)["costs"] if costs.exists() else {},
    )
