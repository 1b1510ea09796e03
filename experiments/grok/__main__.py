"""`python -m experiments.grok`: trains the grid's cells and writes the report."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import importlib.metadata
import sys
import threading
from typing import Any

import jax
from rich.console import Console

from experiments.command_line import parse
from experiments.commands import INTERRUPTED, progress_bar, run_command
from experiments.grok import suites
from experiments.grok.config import GRID, Cell, Config
from experiments.grok.estimate import estimate
from experiments.grok.train import Epoch, Outcome, train_cells
from experiments.parallel import run_in_parallel
from experiments.report.studies import show
from experiments.runs import Run, machine, write_json


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(begin, study)


def begin() -> tuple[Config, Run]:
    """The command line's config, and its run."""
    default = suites.defaults(sys.argv[1:])
    config = parse(Config, "python -m experiments.grok", default=default)
    return config, Run(config.folder(), config.as_json(), GRID)


def study(config: Config, run: Run, stop: threading.Event, console: Console) -> int:
    """Trains what is missing of the grid, and reports on what there is."""
    cells = config.cells()
    finished = {Cell.of(row) for row in run.finished}
    missing = [cell for cell in cells if cell not in finished]
    for note in run.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(
        f"[bold]{run.folder}[/bold]: {len(cells)} trainings of at most {config.epochs} epochs, "
        f"{len(cells) - len(missing)} of them finished.",
        highlight=False,
    )
    try:
        if missing:
            train(config, missing, run, stop, console)
    except KeyboardInterrupt:
        stop.set()
    summarize(config, run)
    if run.finished:
        show(run.folder, console)
    left = len(set(cells) - {Cell.of(row) for row in run.finished})
    if left:
        console.print(
            f"Interrupted; trainings left: {left}. The same command continues from there."
        )
    return INTERRUPTED if left else 0


def train(
    config: Config, missing: list[Cell], run: Run, stop: threading.Event, console: Console
) -> None:
    """Trains cells on all devices, with their progress, into the run's log.

    Raises:
        KeyboardInterrupt: `stop` was set before the cells ended.
    """
    with console.status("estimating the time"):
        expected = estimate(config, missing, stop)
    console.print(str(expected), highlight=False)
    writing = threading.Lock()
    with progress_bar(console) as progress:
        whole = progress.add_task(f"{len(missing)} trainings", total=sum(expected.seconds.values()))

        def work(cells: list[Cell], device: jax.Device) -> None:
            bar = progress.add_task(f"{cells[0]} starting", total=config.epochs)

            def show(cell: Cell, epoch: Epoch) -> None:
                if stop.is_set():
                    raise KeyboardInterrupt
                description = (
                    f"{cell} train {epoch.train_accuracy:4.0%} val {epoch.validation_accuracy:4.0%}"
                )
                progress.update(bar, completed=epoch.epoch, description=description)

            try:
                outcomes = train_cells(config, cells, show, device)
            finally:
                progress.remove_task(bar)
            with writing:
                run.extend([(records(c, o), o.row) for c, o in zip(cells, outcomes, strict=True)])
                for cell, (_, row) in zip(cells, outcomes, strict=True):
                    progress.console.print(f"{cell}: {_outcome(row)}", highlight=False)
                    progress.update(whole, advance=expected.seconds[cell])
                summarize(config, run)

        def arm(cells: list[Cell]) -> Cell:
            return cells[0]._replace(seed=0)

        run_in_parallel(groups(config, missing), arm, work, stop)


def groups(config: Config, cells: list[Cell]) -> list[list[Cell]]:
    """The cells in groups that train together: seeds of one arm, in the order of the cells."""
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


def records(cell: Cell, outcome: Outcome) -> list[dict[str, Any]]:
    """A cell's epochs as lines of the log, without looks inside where none were taken."""
    kept = [
        {k: v for k, v in epoch._asdict().items() if v is not None} for epoch in outcome.history
    ]
    return [cell._asdict() | epoch for epoch in kept]


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


def summarize(config: Config, run: Run) -> None:
    """Writes `summary.json`: one row for each finished cell, in the settings' order."""
    cells = config.cells()
    places = {cell: i for i, cell in enumerate(cells)}
    rows = sorted(run.finished, key=lambda row: places.get(Cell.of(row), len(places)))
    write_json(
        run.folder / "summary.json",
        {
            "version": importlib.metadata.version("muon-jax"),
            "machine": machine(),
            "cells_total": len({*cells, *map(Cell.of, rows)}),
            "cells": rows,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
