"""`python -m experiments.pretrain --suite NAME`: trains a suite's cells and reports on them."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments.commands import INTERRUPTED, progress_bar
from experiments.language import data, windows
from experiments.pretrain.config import Training, as_json
from experiments.pretrain.suites import cells
from experiments.pretrain.suites.config import Cell, SuiteName, model_flops, sized
from experiments.report.studies import show
from experiments.runs import Run, machine, read_json, write_json
from experiments.sweep import run_sweep

# What only chooses cells, or where they run; the rest decides what a cell is.
_FREE = ("optimizer", "seeds", "sweep_seeds", "sweep", "widths", "rates", "mesh", "seed")


def check(config: Any, which: SuiteName) -> dict[int, Training]:
    """What a suite trains, by width.

    Raises:
        ValueError: a size that has no whole number of heads, a folder that is not of this machine,
            or several processes.
    """
    if jax.process_count() > 1 or "://" in str(config.out):
        raise ValueError(
            f"--suite {which} requires one process and a local folder; got {jax.process_count()} "
            f"processes and --out {config.out}."
        )
    return _trainings(config, which)


def suite(
    config: Any, which: SuiteName, tokens: data.Tokens, console: Console, stop: threading.Event
) -> int:
    """Trains what is missing of a suite, and reports on what there is.

    Args:
        config: a `Training`, `Running` and `Suite` in one, with `optimizer` and `out`.
        which: suite.
        tokens: of `data.prepare(config.data)`.
        console: for progress.
        stop: asks for an early end; finished cells are kept.

    Returns:
        The command's exit code.

    Raises:
        RunError: the folder is in use, or holds a suite of other settings.
        ValueError: a size that has no whole number of heads, a text that is too short, a folder
            that is not of this machine, or several processes.
    """
    trainings = check(config, which)
    held_out = windows.held_out(tokens, config.context, config.evaluation_tokens)
    text = cells.Text(tokens, held_out)
    folder = Path(config.out or f"runs/pretrain/suite-{which}")
    run = Run(folder, _settings(config, which, tokens), _FREE)
    try:
        left = run_sweep(
            Cell,
            {(name, width): config.rate(name) for width in trainings for name in config.optimizers},
            config,
            lambda cell, show: cells.train_cell(
                trainings[cell.width],
                text,
                cell.optimizer,
                cell.rate,
                cell.seed,
                config.evaluate_every,
                show,
            ),
            run,
            stop,
            console,
            corpus=tokens.as_json(),
            steps=lambda cell: trainings[cell.width].steps,
            step_work=lambda cell: model_flops(trainings[cell.width]),
            swept=config.sweep_seeds,
        )
        if not left:
            _measure_costs(config, trainings, folder, stop, console)
        if run.finished:
            show(folder, console)
    finally:
        run.close()
    return INTERRUPTED if stop.is_set() else 0


def _trainings(config: Any, which: SuiteName) -> dict[int, Training]:
    """What a cell trains, by width."""
    training = config.training()
    if which == "optimizers":
        return {training.model.width: training}
    return {width: sized(training, width, config.tokens_per_param) for width in config.widths}


def _settings(config: Any, which: SuiteName, tokens: data.Tokens) -> dict[str, Any]:
    names = ["optimizers", "seeds", "sweep_seeds", "evaluate_every", "evaluation_tokens"]
    names += ["widths", "tokens_per_param"] if which == "scaling" else []
    own = {name: getattr(config, name) for name in names}
    settings = {"suite": which} | own | {"sweep": dataclasses.asdict(config.sweep)}
    return as_json(config) | settings | {"text": tokens.as_json()}


def _measure_costs(
    config: Any,
    trainings: dict[int, Training],
    folder: Path,
    stop: threading.Event,
    console: Console,
) -> None:
    """Writes costs.json, of every size whose arms it has not all: ratios are of one process."""
    path = folder / "costs.json"
    costs = read_json(path)["costs"] if path.exists() else {}
    known = {width: set(costs.get(str(width), {})) for width in trainings}
    missing = [width for width in trainings if not known[width] >= set(config.optimizers)]
    if not missing:
        return

    def turn() -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.advance(bar)

    try:
        with progress_bar(console) as progress:
            turns = (cells.ROUNDS + 1) * len(missing) * len(config.optimizers)
            bar = progress.add_task("timing the optimizers", total=turns)
            for width in missing:
                arms = [(name, trainings[width]) for name in config.optimizers]
                found = cells.measure(arms, turn)
                rows = zip(config.optimizers, found, strict=True)
                costs[str(width)] = {name: cost._asdict() for name, cost in rows}
    except KeyboardInterrupt:
        stop.set()
        return
    write_json(path, {"machine": machine(), "costs": costs})
