"""Which cells a sweep of learning rates wants next, and the loop that trains them.

An arm is anything whose rate is swept: an optimizer, or a width with a shape scale. Its losses are
those of finished cells, infinite where one diverged.
"""

import importlib.metadata
import math
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from experiments.commands import progress_bar
from experiments.family.config import Sweep
from experiments.family.data import Data
from experiments.family.train import Evaluation
from experiments.runs import Run, machine, write_json

Row = dict[str, Any]
Cell = TypeVar("Cell", bound=tuple)


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


def best(rows: Iterable[Row]) -> Best | None:
    """The best rate among an arm's rows, None without any."""
    losses = losses_by_rate(rows)
    if not losses:
        return None
    rates = list(losses)
    rate = min(rates, key=lambda rate: mean(losses[rate]))
    return Best(rate, losses[rate], rate in (rates[0], rates[-1]))


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
) -> list[Cell]:
    """The cells that are still to be trained, as far as the finished ones tell.

    Args:
        rows: of the finished cells.
        make: the cell's class, whose fields are the arm's, the rate and the seed.
        arms: default rate by the arm's fields.
        seeds: of every rate.
        sweep: which rates.

    Returns:
        Cells, seeds outermost and arms innermost: every arm has a first result early, and arms take
        turns on a machine that is now quiet and now not.
    """
    finished = {cell_of(make, row) for row in rows}
    rates = {}
    for arm, default in arms.items():
        own = [row for row in rows if cell_of(make, row)[:-2] == arm and row["seed"] < seeds]
        done = {
            rate: mean(losses)
            for rate, losses in losses_by_rate(own).items()
            if len(losses) == seeds
        }
        rates[arm] = wanted_rates(default, done, sweep)
    return [
        cell
        for seed in range(seeds)
        for place in range(max(map(len, rates.values())))
        for arm in arms
        if place < len(rates[arm]) and (cell := make(*arm, rates[arm][place], seed)) not in finished
    ]


def cell_of(make: Callable[..., Cell], row: Row) -> Cell:
    """The cell that a row of the log is of."""
    return make(*(row[field] for field in make._fields))


def carry_out(
    make: Callable[..., Cell],
    arms: Mapping[tuple[Hashable, ...], float],
    config: Any,
    text: Data,
    train: Callable[[Cell, Callable[[Evaluation], None]], tuple[list[Evaluation], Row]],
    run: Run,
    stop: threading.Event,
    console: Console,
) -> int:
    """Trains until nothing is missing, or until `stop` is set; each cell goes into the run's log.

    Args:
        make, arms: as in `missing_cells`.
        config: has `seeds`, `sweep` and the `steps` of a cell.
        text: the corpus.
        train: `(cell, on_evaluation) -> (history, outcome)`.
        run: the open run.
        stop: read at every evaluation.
        console: for progress.

    Returns:
        How many cells are left.
    """

    def missing() -> list[Cell]:
        return missing_cells(run.finished, make, arms, config.seeds, config.sweep)

    def show(evaluation: Evaluation) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.update(
            bar,
            completed=done * config.steps + evaluation.step,
            description=f"{cell} loss {evaluation.validation_loss:.3f}",
        )

    if run.dropped:
        console.print(f"{run.dropped} lines of an unfinished or damaged cell were cut away.")
    console.print(
        f"[bold]{run.folder}[/bold]: {len(missing())} cells of {config.steps} steps to go, and "
        f"more where a best rate lies at the edge; {len(run.finished)} finished.",
        highlight=False,
    )
    done = 0
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("starting")
            while cells := missing():
                cell = cells[0]
                total = (done + len(cells)) * config.steps
                progress.update(bar, total=total, description=f"{cell} starting")
                history, outcome = train(cell, show)
                records = [cell._asdict() | evaluation._asdict() for evaluation in history]
                run.append(records, cell._asdict() | outcome)
                done += 1
                progress.update(bar, completed=done * config.steps)
                console.print(f"{cell}: {_outcome(outcome)}", highlight=False)
                _summarize(run, text, len(run.finished) + len(missing()))
    except KeyboardInterrupt:
        stop.set()
    left = len(missing())
    if run.finished:
        _summarize(run, text, len(run.finished) + left)
    if left:
        console.print(f"Interrupted with {left} cells to go; the same command goes on from there.")
    return left


def _outcome(row: Row) -> str:
    loss = "diverged" if row["diverged"] else f"loss {row['validation_loss']:.4f}"
    return f"{loss}, {row['milliseconds_per_step']:.0f} ms a step"


def _summarize(run: Run, text: Data, total: int) -> None:
    """Writes what the report needs beside the log."""
    write_json(
        run.folder / "summary.json",
        {
            "version": importlib.metadata.version("muon-jax"),
            "machine": machine(),
            "corpus": text.origin,
            "cells_total": total,
        },
    )
