"""`python -m experiments.family`: trains the sweep's cells, measures costs, writes the report."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import sys
import threading

from rich.console import Console

from experiments.command_line import parse
from experiments.commands import INTERRUPTED, progress_bar, run_command
from experiments.family import cost, data
from experiments.family.config import GRID, Cell, Config, as_json, fitted
from experiments.family.train import train_cell
from experiments.report.studies import show
from experiments.runs import Run, machine, read_json, write_json
from experiments.sweep import run_sweep


def main() -> int:
    """Runs the command; returns its exit code."""
    return run_command(begin, study)


def begin() -> tuple[tuple[Config, data.Data], Run]:
    """The command line's config and its corpus, and the run."""
    default = fitted(Config(), sys.argv[1:])
    config = parse(Config, "python -m experiments.family", default=default)
    text = data.load(config)
    return (config, text), Run(config.folder(), as_json(config) | {"corpus": text.origin}, GRID)


def study(task: tuple[Config, data.Data], run: Run, stop: threading.Event, console: Console) -> int:
    """Trains what is missing of the sweep, measures costs, and reports on what there is."""
    config, text = task
    left = run_sweep(
        Cell,
        {(name,): config.rate(name) for name in config.optimizers},
        config,
        lambda cell, show: train_cell(config.training(), text, *cell, show),
        run,
        stop,
        console,
        corpus=text.origin,
        steps=lambda cell: config.steps,
        swept=config.sweep_seeds,
    )
    if not left:
        measure_costs(config, text, run, stop, console)
    if run.finished:
        show(run.folder, console)
    return INTERRUPTED if stop.is_set() else 0


def measure_costs(
    config: Config, text: data.Data, run: Run, stop: threading.Event, console: Console
) -> None:
    """Writes costs.json, unless it has all optimizers: ratios are of one process."""
    path = run.folder / "costs.json"
    if path.exists() and set(config.optimizers) <= read_json(path)["costs"].keys():
        return

    def turn() -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.advance(bar)

    try:
        with progress_bar(console) as progress:
            turns = (cost.ROUNDS + 1) * len({"adamw", *config.optimizers})
            bar = progress.add_task("timing the optimizers", total=turns)
            costs = cost.measure(
                config.training(),
                config.optimizers,
                text,
                rounds=cost.ROUNDS,
                steps=cost.STEPS,
                on_turn=turn,
            )
    except KeyboardInterrupt:
        stop.set()
        return
    rows = {name: of._asdict() for name, of in costs.items()}
    write_json(path, {"machine": machine(), "costs": rows})


if __name__ == "__main__":
    sys.exit(main())
