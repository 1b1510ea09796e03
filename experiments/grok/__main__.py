"""`python -m experiments.grok` trains a grid of optimizers and tasks and writes the report."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import sys
import threading
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from experiments.command_line import parse
from experiments.commands import run_command
from experiments.grok import suites
from experiments.grok.config import GRID, Cell, Config
from experiments.grok.estimate import estimate
from experiments.grok.train import Epoch, train_cells
from experiments.runs import Run
from experiments.study import Device, Show, Study, Trained


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(compare)


def compare(stop: threading.Event, console: Console) -> int:
    """Trains those cells of the command line's grid that are not finished yet."""
    default = suites.defaults(sys.argv[1:])
    config = parse(Config, "python -m experiments.grok", default=default)
    cells = config.cells()
    expected: dict[Cell, float] = {}  # seconds

    def missing() -> list[Cell]:
        finished = {Cell.of(row) for row in run.finished}
        return [cell for cell in cells if cell not in finished]

    def expect(cells: list[Cell]) -> str:
        found = estimate(config, cells, stop)
        expected.update(found.seconds)
        return str(found)

    def train(group: list[Cell], show: Show, device: Device) -> Sequence[Trained]:
        def on_epoch(cell: Cell, epoch: Epoch) -> None:
            accuracies = f"train {epoch.train_accuracy:4.0%} val {epoch.validation_accuracy:4.0%}"
            show(cell, epoch.epoch / config.epochs, accuracies)

        def record(epoch: Epoch) -> dict[str, Any]:
            return {key: value for key, value in epoch._asdict().items() if value is not None}

        outcomes = train_cells(config, group, on_epoch, device)
        return [([record(epoch) for epoch in history], row) for history, row in outcomes]

    def summary() -> dict[str, Any]:
        """Returns one row for each finished cell, in the order of the grid."""
        places = {cell: i for i, cell in enumerate(cells)}
        last = len(places)
        return {"cells": sorted(run.finished, key=lambda row: places.get(Cell.of(row), last))}

    with contextlib.closing(
        Run(config.folder(), config.as_json(), GRID, Config().as_json())
    ) as run:
        plan = (
            f"{len(cells)} trainings of at most {config.epochs} epochs, "
            f"{len(cells) - len(missing())} of them finished."
        )
        return Study(
            run,
            stop,
            console,
            missing=missing,
            train=train,
            plan=plan,
            summary=summary,
            outcome=_outcome,
            work=lambda cell: expected.get(cell, 0.0),
            groups=lambda cells: groups(config, cells),
            program=lambda cells: cells[0]._replace(seed=0),
            estimate=expect,
        ).to_the_end()


def groups(config: Config, cells: list[Cell]) -> list[list[Cell]]:
    """Groups cells that are trained together: seeds of one arm, in the order of the cells."""
    most = config.together or (1 if jax.default_backend() == "cpu" else config.seeds)
    arms: dict[Cell, list[list[Cell]]] = {}
    found = []
    for cell in cells:
        of_arm = arms.setdefault(cell._replace(seed=0), [])
        if not of_arm or len(of_arm[-1]) == most:
            of_arm.append([])
            found.append(of_arm[-1])
        of_arm[-1].append(cell)
    return found


def _outcome(row: dict[str, Any]) -> str:
    grokked = row["grok_epoch_sustained"]
    outcome = (
        f"grokked at epoch {grokked}"
        if grokked
        else "diverged: loss is NaN or Inf"
        if row["diverged"]
        else f"not grokked in {row['epochs_run']} epochs"
    )
    if row["collapse_epoch"]:
        outcome += f", lost it at epoch {row['collapse_epoch']}"
    return f"{outcome}, {row['seconds']:.1f} s, {row['steps_per_second']:.0f} steps/s"


if __name__ == "__main__":
    sys.exit(main())
