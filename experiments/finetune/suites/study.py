"""`python -m experiments.finetune --suite NAME`: trains a suite's cells and reports on them."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from rich.console import Console

from experiments.finetune import base, data, loop, weights
from experiments.finetune.chat import TOKENIZER
from experiments.finetune.config import REAL_WARMUP, WARMUP, ArmName, Base, Training
from experiments.finetune.loop import Model
from experiments.finetune.suites import clip
from experiments.finetune.suites.config import (
    PROJECTIONS,
    UNCLIPPED,
    Cell,
    Variant,
    variants,
    with_threshold,
)
from experiments.language.checkpoints import params_sha256
from experiments.language.launch import check_alone, preparing
from experiments.parallel import devices_for, run_in_parallel
from experiments.runs import Run
from experiments.study import Device, Trained, sweep_rates
from experiments.sweep import Row

# Settings that only select cells or devices, or are measured. All others determine the cells.
_FREE = (
    *("optimizers", "seeds", "sweep_seeds", "sweep"),
    *("mesh", "seed", "max_nonfinite_steps", "clips"),
)
_RECORDED = (
    *("optimizers", "seeds", "sweep_seeds"),
    *("clip_share", "evaluate_every", "evaluation_tokens"),
)
_TIMED = 3  # number of steps that estimates time


def suite(command: Any, console: Console, stop: threading.Event) -> int:
    """Trains the missing cells of a suite, reports on all finished ones, and returns an exit code.

    Args:
        command: A `Training`, `Running` and `Suite` in one, with `optimizers`, `base`, `model`,
            `data` and `out`.
        console: The console for progress.
        stop: Set to request an early end. Finished cells are kept.

    Raises:
        RunError: If the folder is in use, or contains a suite with other settings.
        ValueError: If the settings do not suit the suite or its folder, or there are several
            processes.
    """
    check_alone(command.suite, command.out)
    planned = variants(command)
    models = _models(command, planned, console, stop)
    trainings = {name: _training(of, models[of.base]) for name, of in planned.items()}
    clips = _clips(command, planned, models) if command.suite == "qk" else {}
    trainings |= {name: with_threshold(trainings[name], of.threshold) for name, of in clips.items()}
    settings = _settings(command, models, trainings)
    settings["clips"] = {name: of._asdict() for name, of in clips.items()}
    settings["thresholds"] = {name: of.threshold for name, of in clips.items()}
    arms = {
        (name, arm): of.training.optimizer.learning_rate
        for name, of in planned.items()
        for arm in of.arms
    }
    # With a single learning rate, no seeds are needed to choose it.
    swept = command.sweep_seeds if command.sweep.reach or command.sweep.limit else None

    def train(
        cell: Cell, training: Training, show: Callable[[Row], None], device: Device, **running: Any
    ) -> Trained:
        own = dataclasses.replace(command, **running)
        model = models[planned[cell.variant].base]
        given = training, model, cell.arm, cell.rate, cell.seed, own, device
        return loop.train_cell(*given, show)

    folder = Path(command.out)
    with contextlib.closing(Run(folder, settings, _FREE, Training().as_json())) as run:
        return sweep_rates(
            run,
            stop,
            console,
            command,
            cell=Cell,
            arms=arms,
            training=lambda cell: trainings[cell.variant],
            train=train,
            corpus=next(iter(models.values())).rows.report._asdict(),
            swept=swept,
            program=_program,
            estimate=lambda cells: _estimate(command, cells, trainings, train, swept or 0, stop),
        )


def _program(cells: list[Cell]) -> tuple[str, ArmName]:
    """Equal for cells with the same compiled program."""
    return cells[0].variant, cells[0].arm


class _EnoughError(Exception):
    """Stops a cell that is only timed."""


def _models(
    command: Any, planned: Mapping[str, Variant], console: Console, stop: threading.Event
) -> dict[Base | None, Model]:
    """Loads each model once, and its examples once for each tokenizer. Pretrains small models."""
    models: dict[Base | None, Model] = {}
    read: dict[bytes, data.Prepared] = {}
    with preparing("reading the models", stop, console) as show:
        for wanted in dict.fromkeys(of.base for of in planned.values()):
            folder = base.prepare(wanted, show) if wanted else Path(command.model).expanduser()
            architecture, params = weights.read(folder)
            tokenizer = (folder / TOKENIZER).read_bytes()
            if tokenizer not in read:
                read[tokenizer] = data.read(command, folder, architecture, show)
            name = f"{folder.name} {params_sha256(params)[:12]}"
            text, kept = data.pretraining_text(command, folder), jax.device_get(params)
            models[wanted] = Model(name, architecture, kept, read[tokenizer], text)
    return models


def _training(variant: Variant, of: Model) -> Training:
    return variant.training.with_steps(
        loop.batches(of.rows.train, variant.training, 0).windows,
        WARMUP if variant.base else REAL_WARMUP,
    )


def _settings(
    command: Any,
    models: Mapping[Base | None, Model],
    trainings: Mapping[str, Training],
) -> dict[str, Any]:
    known = next(iter(trainings.values()))
    return {
        "suite": command.suite,
        **command.as_json(),
        **{name: getattr(command, name) for name in _RECORDED},
        "steps": known.steps,
        "warmup": known.warmup,
        "sweep": dataclasses.asdict(command.sweep),
        "models": [of.name for of in models.values()],
        "data": next(iter(models.values())).rows.report.sha256,
    }


def _estimate(
    command: Any,
    cells: list[Cell],
    trainings: Mapping[str, Training],
    train: Callable[..., Any],
    swept: int,
    stop: threading.Event,
) -> str:
    """Estimates the time of the missing cells from a few steps on all devices at once.

    The programs compiled for this are reused.
    """
    choosing = {_program([cell]) for cell in cells if cell.seed < swept}
    count = len(cells) + len(choosing) * (command.seeds - swept)
    programs = list({_program([cell]): cell for cell in cells}.values())
    compiling, whole = [], []  # seconds up to the first evaluation, and of a cell after it

    def time_some(cell: Cell, device: jax.Device) -> None:
        training, clock = trainings[cell.variant], [time.perf_counter()]
        steps, evaluations = training.steps, 1 + -(-training.steps // command.evaluate_every)

        def watch(evaluation: Row) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            clock.append(time.perf_counter())
            if step := evaluation["step"]:
                began, first, second = clock
                seconds = evaluation["seconds"]
                compiling.append(first - began)
                whole.append(steps * seconds / step + evaluations * (second - first - seconds))
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            train(cell, training, watch, device, evaluate_every=_TIMED)

    timed = programs[: len(devices_for(len(programs)))]
    run_in_parallel(timed, lambda cell: cell, time_some, stop)
    if not whole:
        return "unknown, since all timed trainings diverged at once."
    once, each, devices = fmean(compiling), fmean(whole), len(devices_for(count))
    total = (count * each + (len(programs) - len(whole)) * once) / devices
    return (
        f"{_duration(total)} for {count} trainings; {_duration(each)} each on "
        f"{devices} {'device' if devices == 1 else 'devices at once'}, and {_duration(once)} to "
        f"compile each of {len(programs)} programs. More are added if a best learning rate is "
        "the highest or lowest one tried."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clips(
    command: Any, planned: Mapping[str, Variant], models: Mapping[Base | None, Model]
) -> dict[str, clip.Clipped]:
    """Measures the effects of one clip on the initial models of --suite qk."""
    found = {}
    for name, variant in planned.items():
        if not name.endswith(UNCLIPPED):
            of = models[variant.base]
            batch = loop.batches(of.rows.train, variant.training, 0)[0]
            given = of.architecture, of.params, batch, command.clip_share
            found[name] = clip.measure(*given, projections=name.endswith(PROJECTIONS))
    return found
