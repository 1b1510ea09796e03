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

# Settings that only select cells or devices. All others determine what a cell trains.
_FREE = ("optimizers", "seeds", "sweep_seeds", "sweep", "widths", "rates", "mesh", "seed")


def check(config: Any, which: SuiteName) -> dict[int, Training]:
    """Checks a suite's settings, and returns those of its trainings by width.

    Raises:
        ValueError: If a width is not a multiple of the head size, the folder is not local, or there
            are several processes.
    """
    check_alone(which, config.out)
    return _trainings(config, which)


def suite(
    config: Any, which: SuiteName, tokens: data.Tokens, console: Console, stop: threading.Event
) -> int:
    """Trains the missing cells of a suite, reports on all finished ones, and returns an exit code.

    Args:
        config: A `Training`, `Running` and `Suite` in one, with `optimizers` and `out`.
        which: The suite.
        tokens: The text, from `data.prepare(config.data)`.
        console, stop: As for `study.sweep_rates`.

    Raises:
        RunError: If the folder is in use, or contains a suite with other settings.
        ValueError: As for `check`, or if the text is too short.
    """
    trainings = check(config, which)
    held_out = windows.held_out(tokens, config.context, config.evaluation_tokens)
    folder = Path(config.out or f"runs/pretrain/suite-{which}")
    names = config.optimizers
    costs = [
        Timed(names, partial(cells.measure, [(n, training) for n in names]), str(width))
        for width, training in trainings.items()
    ]
    settings, usual = _settings(config, which, tokens), as_json(Training())
    with contextlib.closing(Run(folder, settings, _FREE, usual)) as run:
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
    """Returns the settings of the trainings by width."""
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
