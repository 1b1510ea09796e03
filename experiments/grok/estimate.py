"""How long cells will take: as in an earlier run of the same settings, or at most."""

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
_COMPILING = 4.0  # seconds an arm, on two cores


class Estimate(NamedTuple):
    """How long cells take on all devices.

    Attributes:
        seconds: of each cell's share, expected where an earlier run has the cell, else at most.
        known: how many cells an earlier run has.
        full_length: cells do not end where they grok.
    """

    seconds: dict[Cell, float]
    known: int
    full_length: bool

    def __str__(self) -> str:
        total = datetime.timedelta(seconds=round(sum(self.seconds.values())))
        if self.known == len(self.seconds):
            return f"{total}, from an earlier run and the speed of this machine."
        if self.full_length:
            return f"{total}; every training runs to its last epoch."
        if self.known:
            return f"at most {total}; {self.known} trainings are known from an earlier run."
        return f"at most {total}; a training ends once it has grokked."


def estimate(config: Config, cells: Sequence[Cell], stop: threading.Event) -> Estimate:
    """Times the smallest and the largest step of each optimizer that no earlier run tells of.

    The programs are needed anyway, and each core compiles some. Between the two a step's time is
    linear in its work. Where all is known, the first arm tells this machine's speed.

    Raises:
        KeyboardInterrupt: `stop` was set.
    """
    earlier = _earlier(config, cells)
    first = {cell._replace(seed=0): cell for cell in reversed(cells)}
    busy = list(first.values())[-len(devices_for(len(first))) :]
    unknown = [cell for cell in cells if cell in busy or cell not in earlier]
    seconds_of = _timed(config, unknown, stop)
    there = earlier.get(cells[0])
    factor = seconds_of(cells[0]) * there["steps_per_second"] if there else 1.0
    arms = {cell._replace(seed=0) for cell in cells}
    compiling = _COMPILING * len(arms) / len(cells)
    seconds = {}
    for cell in cells:
        if cell in earlier:
            training = earlier[cell]["seconds"] * factor
        else:
            training = config.epochs * _steps(config, cell) * seconds_of(cell)
        seconds[cell] = (training + compiling) / len(devices_for(len(cells)))
    return Estimate(seconds, sum(cell in earlier for cell in cells), config.full_length)


def _timed(config: Config, cells: Sequence[Cell], stop: threading.Event) -> Callable[[Cell], float]:
    """What a step of each of these cells takes, in seconds."""
    works: dict[tuple, dict[int, Cell]] = {}
    for cell in cells:
        works.setdefault(_kind(cell), {}).setdefault(_work(config, cell), cell)
    points = {kind: sorted({min(of), max(of)}) for kind, of in works.items()}
    chosen = [works[kind][work] for kind, at in points.items() for work in at]
    taken: dict[Cell, float] = {}

    def time_one(cell: Cell, device: jax.Device) -> None:
        taken[cell] = _seconds_per_step(config, cell, device)

    run_in_parallel(chosen, lambda cell: cell, time_one, stop)

    def seconds(cell: Cell) -> float:
        kind, at = _kind(cell), points[_kind(cell)]
        return float(np.interp(_work(config, cell), at, [taken[works[kind][w]] for w in at]))

    return seconds


def _earlier(config: Config, cells: Sequence[Cell]) -> dict[Cell, dict]:
    """Of the complete runs with these settings, that which has most of these cells."""
    found, defaults = [], Config().as_json()
    for path in RESULTS.glob("*/config.json"):
        settings = with_defaults(read_settings(path), defaults)
        if not changed_settings(settings, config.as_json(), GRID):
            rows = read_json(path.with_name("summary.json"))["cells"]
            found.append({Cell.of(row): row for row in rows})
    return max(found, key=lambda run: len(run.keys() & set(cells)), default={})


def _seconds_per_step(config: Config, cell: Cell, device: jax.Device) -> float:
    """Of the cell's arm, without the compilation."""
    settings = config.at(cell)
    program = compile_arm(settings, cell._replace(seed=0, point=""), 1, device)
    rows = program.place(split(settings, cell).train[None])
    one = program.place(np.array([cell.seed], np.int32))
    epoch = repeated(lambda state: program.epoch(state, rows, one, one)[0], program.start(one), 1)
    return statistics.median(seconds_of(epoch) for _ in range(3)) / program.steps


def _steps(config: Config, cell: Cell) -> int:
    settings = config.at(cell)
    train = len(split(settings, cell).train)
    return train // min(settings.batch, train)


def _kind(cell: Cell) -> tuple:
    """Steps of one kind take the longer the more work they have."""
    return cell.optimizer, table(cell.task).tokens.shape[1]


def _work(config: Config, cell: Cell) -> int:
    """Rows times params, about."""
    settings = config.at(cell)
    return settings.batch * settings.layers * settings.width**2
