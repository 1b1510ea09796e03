"""`python -m experiments.finetune --suite NAME`: trains a suite's cells and reports on them."""

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from experiments.commands import INTERRUPTED, progress_bar
from experiments.finetune import base, data, loop, weights
from experiments.finetune.architecture import Qwen3
from experiments.finetune.chat import TOKENIZER, Chat
from experiments.finetune.config import REAL_WARMUP, WARMUP, Base, Training
from experiments.finetune.model import Params
from experiments.finetune.suites import clip
from experiments.finetune.suites.config import (
    GAINS,
    NO_QK_NORM,
    PROJECTIONS,
    QK_NORM,
    Cell,
    SuiteName,
    Variant,
    variants,
    with_threshold,
)
from experiments.language.checkpoints import params_sha256
from experiments.parallel import devices_for, run_in_parallel
from experiments.report.studies import show
from experiments.runs import Run
from experiments.sweep import missing_cells, run_sweep

# What only chooses cells, or where they run, or was measured; the rest decides what a cell is.
_FREE = (
    "optimizers",
    "seeds",
    "sweep_seeds",
    "sweep",
    "mesh",
    "seed",
    "max_nonfinite_steps",
    "clips",
)
_TIMED = 3  # steps


class Model(NamedTuple):
    """What a variant fine-tunes, in the host's memory, and its rows."""

    name: str
    architecture: Qwen3
    params: Params
    rows: data.Prepared


def suite(command: Any, which: SuiteName, console: Console, stop: threading.Event) -> int:
    """Trains what is missing of a suite, and reports on what there is.

    Args:
        command: a `Training`, `Running` and `Suite` in one, with `arms`, `base`, `model`, `data`
            and `out`.
        which: suite.
        console: for progress.
        stop: asks for an early end; finished cells are kept.

    Returns:
        The command's exit code.

    Raises:
        RunError: the folder is in use, or holds a suite of other settings.
        ValueError: settings that the suite cannot have, several processes, or a folder that is not
            of this machine.
    """
    if jax.process_count() > 1 or "://" in command.out:
        raise ValueError(
            f"--suite {which} requires one process and a local folder; got {jax.process_count()} "
            f"processes and --out {command.out}."
        )
    planned = variants(command, which)
    try:
        models = _models(command, planned, console, stop)
    except KeyboardInterrupt:
        return INTERRUPTED
    trainings = {name: _training(of, models[of.base]) for name, of in planned.items()}
    clips = _clips(command, planned, models) if which == "qk" else {}
    trainings |= {name: with_threshold(trainings[name], of.threshold) for name, of in clips.items()}
    settings = _settings(command, which, models, trainings)
    settings |= {
        "clips": {name: of._asdict() for name, of in clips.items()},
        "thresholds": {name: of.threshold for name, of in clips.items()},
    }
    folder = Path(command.out)
    run = Run(folder, settings, _FREE)
    try:
        arms = {
            (name, arm): of.training.optimizer.learning_rate
            for name, of in planned.items()
            for arm in of.arms
        }
        # Where there is one rate no seed has to choose it.
        swept = command.sweep_seeds if command.sweep.reach or command.sweep.limit else None
        work = _Work(command, planned, trainings, models)
        try:
            _estimate(work, run, arms, swept, stop, console)
            run_sweep(
                Cell,
                arms,
                command,
                work.train,
                run,
                stop,
                console,
                corpus=next(iter(models.values())).rows.report.as_json(),
                steps=lambda cell: trainings[cell.variant].steps,
                swept=swept,
                program=lambda cell: (cell.variant, cell.arm),
            )
        except KeyboardInterrupt:
            stop.set()
        if run.finished:
            show(folder, console)
    finally:
        run.close()
    return INTERRUPTED if stop.is_set() else 0


@dataclasses.dataclass(frozen=True)
class _Work:
    """Trains cells, each on the device that its thread has."""

    command: Any
    planned: Mapping[str, Variant]
    trainings: Mapping[str, Training]
    models: Mapping[Base | None, Model]

    def model(self, cell: Cell) -> Model:
        return self.models[self.planned[cell.variant].base]

    def train(
        self, cell: Cell, on_evaluation: Callable[[loop.Evaluation], None], **running: Any
    ) -> tuple[list[loop.Evaluation], dict[str, Any]]:
        of = self.model(cell)
        history, outcome = loop.train_cell(
            self.trainings[cell.variant],
            of.rows,
            cell.arm,
            of.architecture,
            of.params,
            cell.rate,
            cell.seed,
            dataclasses.replace(self.command, **running),
            jax.config.jax_default_device or jax.local_devices()[0],
            on_evaluation,
        )
        return [_finite(evaluation) for evaluation in history], outcome


class _Timed(NamedTuple):
    """Seconds until the first evaluation was done, and of a whole cell after that."""

    compiling: float
    cell: float


class _EnoughError(Exception):
    """Ends a cell that is only timed."""


def _finite(evaluation: loop.Evaluation) -> loop.Evaluation:
    """With None for what is not, as the norm of a step that was skipped may be."""
    text = json.dumps(evaluation._asdict())
    return loop.Evaluation(**json.loads(text, parse_constant=lambda constant: None))


def _models(
    command: Any, planned: Mapping[str, Variant], console: Console, stop: threading.Event
) -> dict[Base | None, Model]:
    """Every model once, pretrained if need be; rows are read once for each tokenizer."""
    models: dict[Base | None, Model] = {}
    read: dict[bytes, data.Prepared] = {}
    with progress_bar(console) as bar:
        task = bar.add_task("reading the models", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            bar.update(task, description=what, completed=done, total=total)

        for wanted in dict.fromkeys(of.base for of in planned.values()):
            folder = base.prepare(wanted, show) if wanted else Path(command.model).expanduser()
            architecture, params = weights.read(folder)
            tokenizer = (folder / TOKENIZER).read_bytes()
            if tokenizer not in read:
                chat = Chat(folder)
                if chat.vocabulary > architecture.vocabulary:
                    raise ValueError(
                        f"{folder}: the tokenizer has {chat.vocabulary} tokens, and the model "
                        f"{architecture.vocabulary}. The files are of different models."
                    )
                read[tokenizer] = data.prepare(
                    command.data,
                    chat,
                    command.context,
                    on_progress=lambda done: show(f"reading rows, {done:,}", done, None),
                )
            name = f"{folder.name} {params_sha256(params)[:12]}"
            models[wanted] = Model(name, architecture, jax.device_get(params), read[tokenizer])
    return models


def _training(variant: Variant, of: Model) -> Training:
    return variant.training.with_steps(
        loop.batches(of.rows.train, variant.training, 0).windows,
        WARMUP if variant.base else REAL_WARMUP,
    )


def _settings(
    command: Any,
    which: SuiteName,
    models: Mapping[Base | None, Model],
    trainings: Mapping[str, Training],
) -> dict[str, Any]:
    names = (
        "optimizers",
        "seeds",
        "sweep_seeds",
        "clip_share",
        "evaluate_every",
        "evaluation_tokens",
    )
    own = {name: getattr(command, name) for name in names}
    known = next(iter(trainings.values()))
    return {
        "suite": which,
        **command.as_json(),
        **own,
        "steps": known.steps,
        "warmup": known.warmup,
        "optimizers": list(command.optimizers),
        "sweep": dataclasses.asdict(command.sweep),
        "models": [of.name for of in models.values()],
        "data": next(iter(models.values())).rows.report.sha256,
    }


def _estimate(
    work: _Work,
    run: Run,
    arms: Mapping[tuple[str, Any], float],
    swept: int | None,
    stop: threading.Event,
    console: Console,
) -> None:
    """Prints how long the cells to go will take: a few steps of some, on all devices at once.

    What is compiled for it is not compiled again.
    """
    command = work.command
    cells = missing_cells(run.finished, Cell, arms, command.seeds, command.sweep, swept)
    choosing = {(cell.variant, cell.arm) for cell in cells if cell.seed < (swept or 0)}
    count = len(cells) + len(choosing) * (command.seeds - (swept or 0))
    programs = list({(cell.variant, cell.arm): cell for cell in cells}.values())
    if not programs:
        return
    found: list[_Timed] = []

    def time_some(cell: Cell, device: jax.Device) -> None:
        began, evaluations = time.perf_counter(), []

        def watch(evaluation: loop.Evaluation) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            evaluations.append((time.perf_counter(), evaluation))
            if evaluation.step:
                raise _EnoughError

        steps = work.trainings[cell.variant].steps
        try:
            work.train(cell, watch, evaluate_every=_TIMED)
        except _EnoughError:
            (start, _), (end, last) = evaluations
            times = 1 + -(-steps // command.evaluate_every)
            each = steps * last.seconds / last.step + times * (end - start - last.seconds)
            found.append(_Timed(start - began, each))

    devices = len(devices_for(count))
    with console.status("estimating the time"):
        run_in_parallel(
            programs[: len(devices_for(len(programs)))], lambda cell: cell, time_some, stop
        )
    if not found:  # each diverged at once
        return
    once = statistics.fmean(of.compiling for of in found)
    each = statistics.fmean(of.cell for of in found)
    whole = (count * each + (len(programs) - len(found)) * once) / devices
    console.print(
        f"Expected time: {_duration(whole)} for {count} trainings; {_duration(each)} each on "
        f"{devices} {'device' if devices == 1 else 'devices at once'}, and {_duration(once)} to "
        f"compile each of {len(programs)} programs. More are added if a best learning rate is "
        "the highest or lowest one tried.",
        highlight=False,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _clips(
    command: Any, planned: Mapping[str, Variant], models: Mapping[Base | None, Model]
) -> dict[str, clip.Clipped]:
    """What one clip changes in the models that the cells of --suite qk begin with."""
    found = {}
    for norm, clipped in ((QK_NORM, PROJECTIONS), (QK_NORM, GAINS), (NO_QK_NORM, PROJECTIONS)):
        variant = planned[f"{norm}, {clipped}"]
        of = models[variant.base]
        found[f"{norm}, {clipped}"] = clip.measure(
            of.architecture,
            of.params,
            loop.batches(of.rows.train, variant.training, 0)[0],
            command.clip_share,
            projections=clipped == PROJECTIONS,
        )
    return found
