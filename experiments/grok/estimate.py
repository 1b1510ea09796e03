"""Estimates the training time of cells, from an earlier run or as an upper bound."""

import datetime
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.grok.config import GRID, Cell, Config
from experiments.grok.tasks import table
from experiments.grok.train import compile_arm, split
from experiments.parallel import devices_for, run_in_parallel
from experiments.runs import changed_settings, read_json, read_settings, with_defaults
from experiments.timing import repeated, seconds_of

RESULTS = Path(__file__).parent / "results"
_COMPILING = 4.0  # seconds for each arm, on two cores


class Estimate(NamedTuple):
    """An estimate of the training time of cells on all devices.

    Attributes:
        seconds: The expected time of each cell if an earlier run has it, otherwise an upper bound.
        known: The number of cells that an earlier run has.
        full_length: Whether cells train for all epochs, even after they have grokked.
    """

    seconds: dict[Cell, float]
    known: int
    full_length: bool

    def __str__(self) -> str:
        total = datetime.timedelta(seconds=round(sum(self.seconds.values())))
        if self.known == len(self.seconds):
            return f"{total}, estimated from an earlier run and the speed of this machine."
        if self.full_length:
            return f"{total}; every training runs for all epochs."
        if self.known:
            return f"at most {total}; an earlier run has {self.known} of these trainings."
        return f"at most {total}; a training stops early once it has grokked."


def estimate(config: Config, cells: Sequence[Cell], stop: threading.Event) -> Estimate:
    """Estimates the time of cells.

    For each optimizer without an earlier run, it times the smallest and the largest step and
    interpolates linearly in between. The compiled programs are needed later anyway. If an earlier
    run has all cells, the first arm is timed to compare this machine with that of the run.

    Raises:
        KeyboardInterrupt: `stop` was set.
    """
    earlier = _earlier(config, cells)
    first = {cell._replace(seed=0): cell for cell in reversed(cells)}
    busy = list(first.values())[-len(devices_for(len(first))) :]
    unknown = [cell for cell in cells if cell in busy or cell not in earlier]
    step = _timed(config, unknown, stop)
    there = earlier.get(cells[0])
    factor = step(cells[0]) * there["steps_per_second"] if there else 1.0

    def seconds(cell: Cell) -> float:
        if cell in earlier:
            return earlier[cell]["seconds"] * factor
        settings, rows = config.at(cell), len(split(config.at(cell), cell).train)
        return config.epochs * (rows // min(settings.batch, rows)) * step(cell)

    compiling, devices = _COMPILING * len(first) / len(cells), len(devices_for(len(cells)))
    expected = {cell: (seconds(cell) + compiling) / devices for cell in cells}
    return Estimate(expected, sum(cell in earlier for cell in cells), config.full_length)


def _timed(config: Config, cells: Sequence[Cell], stop: threading.Event) -> Callable[[Cell], float]:
    """Times steps and returns a function that gives the seconds per step of a cell."""

    def kind(cell: Cell) -> tuple:
        """Returns a key of cells among which the time of a step grows with its work."""
        return cell.optimizer, table(cell.task).tokens.shape[1]

    def work(cell: Cell) -> int:
        """Returns the approximate work of a step: rows of the batch times parameters."""
        settings = config.at(cell)
        return settings.batch * settings.layers * settings.width**2

    works: dict[tuple, dict[int, Cell]] = {}
    for cell in cells:
        works.setdefault(kind(cell), {}).setdefault(work(cell), cell)
    chosen = {key: {at: of[at] for at in sorted({min(of), max(of)})} for key, of in works.items()}
    taken: dict[Cell, float] = {}

    def time_one(cell: Cell, device: jax.Device) -> None:
        taken[cell] = _seconds_per_step(config, cell, device)

    jobs = [cell for of in chosen.values() for cell in of.values()]
    run_in_parallel(jobs, lambda cell: cell, time_one, stop)

    def seconds(cell: Cell) -> float:
        of = chosen[kind(cell)]
        return float(np.interp(work(cell), [*of], [taken[each] for each in of.values()]))

    return seconds


def _earlier(config: Config, cells: Sequence[Cell]) -> dict[Cell, dict]:
    """Returns the rows of the stored run with these settings that has most of these cells."""
    found, defaults = [], Config().as_json()
    for path in RESULTS.glob("*/config.json"):
        settings = with_defaults(read_settings(path), defaults)
        if not changed_settings(settings, config.as_json(), GRID):
            rows = read_json(path.with_name("summary.json"))["cells"]
            found.append({Cell.of(row): row for row in rows})
    return max(found, key=lambda run: len(run.keys() & set(cells)), default={})


def _seconds_per_step(config: Config, cell: Cell, device: jax.Device) -> float:
    """Returns the seconds per step of the cell's arm, without compilation."""
    settings = config.at(cell)
    program = compile_arm(settings, cell._replace(seed=0, point=""), 1, device)
    rows = program.place(split(settings, cell).train[None])
    one = program.place(np.array([cell.seed], np.int32))
    epoch = repeated(lambda state: program.epoch(state, rows, one, one)[0], program.start(one), 1)
    return statistics.median(seconds_of(epoch) for _ in range(3)) / program.steps
