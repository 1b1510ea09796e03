"""`python -m experiments.grok`: trains the grid's cells and writes the report."""

import importlib.metadata
import sys
import threading
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID

from experiments.commands import INTERRUPTED, conduct, progress_bar
from experiments.grok.config import GRID, Cell, Config
from experiments.grok.report import terminal_table, write_report
from experiments.grok.train import Epoch, train_cell
from experiments.runs import Run, machine, write_json


def main() -> int:
    """Runs the command; returns its exit code."""
    return conduct(begin, study)


def begin() -> tuple[Config, Run]:
    """The command line's config, and its run."""
    config = tyro.cli(Config, prog="python -m experiments.grok")
    return config, Run(config.folder(), config.as_json(), GRID)


def study(config: Config, run: Run, stop: threading.Event, console: Console) -> int:
    """Trains what is missing of the grid, and reports on what there is."""
    cells = config.cells()
    finished = {cell_of(row) for row in run.finished}
    missing = [cell for cell in cells if cell not in finished]
    if run.dropped:
        console.print(f"{run.dropped} lines of an unfinished or damaged cell were cut away.")
    console.print(
        f"[bold]{run.folder}[/bold]: {len(cells)} cells of at most {config.epochs} epochs, "
        f"{len(cells) - len(missing)} of them finished.",
        highlight=False,
    )
    total = len(finished | set(cells))
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("starting", total=len(missing) * config.epochs)
            for i, cell in enumerate(missing):
                train(config, cell, run, stop, progress, bar)
                progress.update(bar, completed=(i + 1) * config.epochs)
                summarize(run, total)
    except KeyboardInterrupt:
        stop.set()
    summarize(run, total)
    if run.finished:
        report = write_report(run.folder)
        console.print(terminal_table(run.finished, budget=config.epochs))
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    left = len(set(cells) - {cell_of(row) for row in run.finished})
    if left:
        console.print(f"Interrupted with {left} cells to go; the same command goes on from there.")
    return INTERRUPTED if left else 0


def train(
    config: Config, cell: Cell, run: Run, stop: threading.Event, progress: Progress, bar: TaskID
) -> None:
    """One cell, with its progress, into the run's log.

    Raises:
        KeyboardInterrupt: `stop` was set before the cell ended.
    """

    def show(epoch: Epoch) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.update(
            bar,
            advance=1,
            description=f"{cell} train {epoch.train_accuracy:4.0%} "
            f"val {epoch.validation_accuracy:4.0%}",
        )

    progress.update(bar, description=f"{cell} starting")
    history, row = train_cell(config, cell, show)
    run.append([{**cell._asdict(), **epoch._asdict()} for epoch in history], row)
    grokked = row["grok_epoch_sustained"]
    outcome = (
        f"grokked at epoch {grokked}"
        if grokked
        else "loss no longer finite"
        if row["diverged"]
        else f"not grokked in {row['epochs_run']} epochs"
    )
    progress.console.print(
        f"{cell}: {outcome}, {row['seconds']:.1f} s, {row['steps_per_second']:.0f} steps/s",
        highlight=False,
    )


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row of the summary is of."""
    return Cell(*(row[field] for field in Cell._fields))


def summarize(run: Run, total: int) -> None:
    """Writes `summary.json`: one row for each finished cell."""
    write_json(
        run.folder / "summary.json",
        {
            "version": importlib.metadata.version("muon-jax"),
            "machine": machine(),
            "cells_total": total,
            "cells": run.finished,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
