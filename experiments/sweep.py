"""Sweeps of learning rates: which cells to train next, and which rate is best.

An arm is anything whose rate is swept: an optimizer, or a width with a shape scale. Its losses are
the final losses of its finished cells; the loss of a cell that diverged is infinite.
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
    """The learning rates at which an optimizer is trained."""

    factor: Annotated[float, above(1)] = 2.0
    """Ratio of neighbouring learning rates."""
    reach: Whole = 1
    """Number of learning rates to try above, and as many below, the default one."""
    limit: Whole = 4
    """Number of further learning rates to try, at most, on a side where the last one is best."""


@dataclasses.dataclass(frozen=True)
class Seeded:
    """The seeds and learning rates of each arm of a suite."""

    seeds: Count = 3
    """Number of random seeds. In a suite all of them train at the best learning rate. A seed sets
    the order of the training data and, in pretraining, the initial parameters."""
    sweep_seeds: Count = 1
    """Number of seeds that choose the best learning rate. A suite trains them at every rate, and
    the other seeds only at the best one. At most --seeds."""
    sweep: Sweep = dataclasses.field(default_factory=Sweep)
    """Learning rates to sweep."""

    def __post_init__(self) -> None:
        check(self)
        if self.sweep_seeds > self.seeds:
            raise ValueError(
                f"--sweep-seeds must be at most --seeds {self.seeds}; got {self.sweep_seeds}."
            )


class Best(NamedTuple):
    """The best learning rate of an arm.

    Attributes:
        rate: The rate with the lowest mean loss.
        losses: The losses at this rate, by seed.
        at_edge: Whether this is the highest or the lowest rate that was tried.
    """

    rate: float
    losses: dict[int, float]
    at_edge: bool

    @property
    def mean(self) -> float:
        """The mean loss over the seeds."""
        return mean(self.losses)


def loss_of(row: Row) -> float:
    """Returns the final validation loss of a cell, infinity if it diverged."""
    return math.inf if row["diverged"] else row["validation_loss"]


def losses_by_rate(rows: Iterable[Row]) -> dict[float, dict[int, float]]:
    """Returns an arm's losses by ascending rate and by seed, for rates with most finished seeds."""
    losses: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        losses[row["rate"]][row["seed"]] = loss_of(row)
    most = max(map(len, losses.values()), default=0)
    return {rate: losses[rate] for rate in sorted(losses) if len(losses[rate]) == most}


def mean(losses: Mapping[int, float]) -> float:
    """Returns the mean over seeds."""
    return statistics.fmean(losses.values())


def best(rows: Sequence[Row], swept: int | None = None) -> Best | None:
    """Returns the best rate of an arm, or None if it has no rows.

    Args:
        rows: The rows of the arm's finished cells.
        swept: The number of seeds that choose the rate, by default all. The returned losses are
            those of all seeds.
    """
    losses = losses_by_rate(chosen_by(rows, swept))
    if not losses:
        return None
    rates = list(losses)
    rate = min(rates, key=lambda rate: mean(losses[rate]))
    own = {row["seed"]: loss_of(row) for row in rows if row["rate"] == rate}
    return Best(rate, own, rate in (rates[0], rates[-1]))


def chosen_by(rows: Iterable[Row], swept: int | None) -> list[Row]:
    """Returns the rows of the seeds that choose the rate."""
    return [row for row in rows if swept is None or row["seed"] < swept]


def optimum(losses: dict[float, float], top: float) -> float:
    """Returns the minimum of the parabola in log(rate) through the best rate and its neighbours.

    At an edge of the sweep, or beside a rate that diverged, returns the best rate itself.
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
    """Returns the rates at which an arm should be trained, those nearest the default first.

    Args:
        default: The rate in the middle of the grid.
        mean_losses: The mean loss at each rate that is finished.
        sweep: The grid, and how far it may be extended while its best rate is its last.
    """
    low, high, farthest = -sweep.reach, sweep.reach, sweep.reach + sweep.limit
    while True:
        rates = [rate_at(default, sweep.factor, notch) for notch in range(low, high + 1)]
        known = all(rate in mean_losses for rate in rates)
        top = min(rates, key=mean_losses.__getitem__) if known else None
        if top == rates[0] and -low < farthest:
            low -= 1
        elif top == rates[-1] and high < farthest:
            high += 1
        else:
            return sorted(rates, key=lambda rate: abs(math.log(rate / default)))


def rate_at(default: float, factor: float, notch: int) -> float:
    """Returns a rate of the grid, rounded to four digits so that every file writes it alike."""
    return float(f"{default * factor**notch:.4g}")


def missing_cells(
    rows: Sequence[Row],
    make: Callable[..., Cell],
    arms: Mapping[tuple[Hashable, ...], float],
    seeds: int,
    sweep: Sweep,
    swept: int | None = None,
) -> list[Cell]:
    """Returns the cells that remain to be trained, given the results of the finished ones.

    Args:
        rows: The rows of the finished cells.
        make: The class of a cell. Its fields are those of an arm, the rate and the seed.
        arms: The default rate of each arm, by the arm's fields.
        seeds: The number of seeds at the best rate.
        sweep: The rates to train at.
        swept: The number of seeds at every other rate, by default `seeds`. The remaining seeds are
            trained at the best rate once it is known.

    Returns:
        The cells, ordered by seed, then rate, then arm. Every arm thus has a first result early,
        and changes in the machine's load affect all arms alike.
    """
    finished = {cell_of(make, row) for row in rows}
    trying = seeds if swept is None else min(swept, seeds)
    turns: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for arm, default in arms.items():
        own = [row for row in rows if cell_of(make, row)[:-2] == arm and row["seed"] < trying]
        losses = losses_by_rate(own)
        done = {rate: mean(of) for rate, of in losses.items() if len(of) == trying}
        rates = wanted_rates(default, done, sweep)
        known = all(rate in done for rate in rates)
        confirmed = [min(rates, key=done.__getitem__)] if known else []
        for seed in range(seeds):
            for place, rate in enumerate(rates if seed < trying else confirmed):
                turns[seed, place].append(make(*arm, rate, seed))
    return [cell for turn in sorted(turns) for cell in turns[turn] if cell not in finished]


def cell_of(make: Callable[..., Cell], row: Row) -> Cell:
    """Returns the cell to which a row of the log belongs."""
    return make(*(row[field] for field in make._fields))


class Files(NamedTuple):
    """The contents of a run's files. `histories` are the evaluations of the cell of each row.

    Stored results, which consist of a summary and perhaps the settings, have neither.
    """

    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row]
    histories: list[list[Row]]
    costs: dict[str, dict[str, float]]


def load_run(folder: Path) -> Files:
    """Reads the files of a finished or partly finished run, or of stored results without a log.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file has the wrong content; the message names the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder {folder}. Give the folder of a run.")
    config, summary, log, costs = (
        folder / name for name in ("config.json", "summary.json", "metrics.jsonl", "costs.json")
    )
    for path in (config, summary) if log.exists() else (summary,):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {path.name}. A report needs a run with at least one finished "
                "training."
            )
    found = sealed.read(log)
    for damage in found.damage:
        print_warning(f"{log} is damaged: {damage}.")
    pieces = finished_pieces(found)
    return Files(
        read_settings(config) if config.is_file() else {},
        read_json(summary),
        [row for _, row in pieces],
        [records for records, _ in pieces],
        read_json(costs)["costs"] if costs.exists() else {},
    )
