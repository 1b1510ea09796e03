"""`python -m experiments.family` trains a sweep of optimizers, times them, writes the report."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import functools
import sys
import threading

from rich.console import Console

from experiments.command_line import parse
from experiments.commands import run_command
from experiments.family import cost, data
from experiments.family.config import BASELINE, GRID, Cell, Config, as_json, fitted
from experiments.family.train import train_cell
from experiments.runs import Run
from experiments.study import Timed, sweep_rates


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(compare)


def compare(stop: threading.Event, console: Console) -> int:
    """Trains those cells of the command line's sweep that are not finished yet."""
    default = fitted(Config(), sys.argv[1:])
    config = parse(Config, "python -m experiments.family", default=default)
    text = data.load(config)
    settings = as_json(config) | {"corpus": text.origin}
    training, names = config.training(), list(dict.fromkeys([BASELINE, *config.optimizers]))
    with contextlib.closing(Run(config.folder(), settings, GRID, as_json(Config()))) as run:
        return sweep_rates(
            run,
            stop,
            console,
            config,
            cell=Cell,
            arms={(name,): config.rate(name) for name in config.optimizers},
            training=lambda cell: training,
            train=lambda cell, training, show, device: train_cell(
                training, text, *cell, show, device
            ),
            program=lambda cells: cells[0].optimizer,
            corpus=text.origin,
            swept=config.sweep_seeds,
            costs=[Timed(names, functools.partial(cost.measure, training, names, text))],
        )


if __name__ == "__main__":
    sys.exit(main())
