"""`python -m experiments.pretrain --suite NAME`: trains a suite's cells and reports on them."""

import contextlib
import dataclasses
import threading
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.language import data, windows
from experiments.language.launch import check_alone
from experiments.pretrain.config import Training, as_json
from experiments.pretrain.suites import cells
from experiments.pretrain.suites.config import Cell, SuiteName, model_flops, sized
from experiments.runs import Run
from experiments.study import Timed, sweep_rates

# What only chooses cells, or where they run; the rest decides what a cell is.
_FREE = ("optimizers", "seeds", "sweep_seeds", "sweep", "widths", "rates", "mesh", "seed")


def check(config: Any, which: SuiteName) -> dict[int, Training]:
    """What a suite trains, by width.

    Raises:
        ValueError: a size that has no whole number of heads, a folder that is not of this machine,
            or several processes.
    """
    check_alone(which, config.out)
    return _trainings(config, which)


def suite(
    config: Any, which: SuiteName, tokens: data.Tokens, console: Console, stop: threading.Event
) -> int:
    """Trains what is missing of a suite, and reports on what there is.

    Args:
        config: a `Training`, `Running` and `Suite` in one, with `optimizers` and `out`.
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
    folder = Path(config.out or f"runs/pretrain/suite-{which}")
    names = config.optimizers
    costs = [
        Timed(names, partial(cells.measure, [(n, training) for n in names]), str(width))
        for width, training in trainings.items()
    ]
    with contextlib.closing(Run(folder, _settings(config, which, tokens), _FREE)) as run:
        return sweep_rates(
            run,
            stop,
            console,
            config,
            cell=Cell,
            arms={(name, width): config.rate(name) for width in trainings for name in names},
            training=lambda cell: trainings[cell.width],
            train=lambda cell, training, show, device: cells.train_cell(
                training, tokens, held_out, config.evaluate_every, cell, show
            ),
            corpus=tokens.as_json(),
            swept=config.sweep_seeds,
            step_work=model_flops,
            costs=costs,
        )


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
