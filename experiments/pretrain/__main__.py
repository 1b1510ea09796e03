"""`python -m experiments.pretrain`: trains, resumes, compares, and plans what is too large."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import functools
import sys
import threading
from pathlib import Path
from typing import get_args

import jax
from etils import epath
from rich.console import Console

from experiments import command_line
from experiments.commands import progress_bar
from experiments.language import data
from experiments.language.launch import claimed, launch, preparing, showing
from experiments.language.mesh import make_mesh
from experiments.language.processes import Processes
from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain import step
from experiments.pretrain.config import PresetName, Running, Training
from experiments.pretrain.loop import Pretraining
from experiments.pretrain.presets import PRESETS, fitted
from experiments.pretrain.suites import study
from experiments.pretrain.suites.config import Suite, SuiteName, defaults
from experiments.pretrain.trained import settings_of
from experiments.runs import RunError, check_free, check_group, holds_run
from experiments.settings import check_different, given, given_text


@dataclasses.dataclass(frozen=True)
class Command(Suite, Running, Training):
    """Pretrains a mixture-of-experts language model, with Muon and with AdamW.

    Without options it trains a small model on the source of Python's standard library with both
    optimizers, in some minutes on two CPU cores, and writes a report with loss curves in bits per
    byte and texts that the models write. `--preset` takes larger models, `--data.files` other text,
    and `--suite` compares many trainings. The same command continues a run, bit for bit, after
    Ctrl-C or SIGTERM (which save a checkpoint and exit with 130), a crash or a kill.
    """

    preset: PresetName = "tiny"
    """Named model to begin with; explicit options override its settings. It has a schedule and
    learning rates, too."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Optimizers to compare. Each of several has a folder of its own in --out."""
    out: str | None = None
    """Folder of the run. By default runs/pretrain/PRESET; it may be in gs:// or s3://."""
    dry_run: bool = False
    """Train nothing, and print what a step would cost. Printed is also which optimizer takes which
    parameter."""
    compile_only: bool = False
    """Train nothing, compile the step for --topology, and print what it would cost there."""
    topology: str | None = None
    """Accelerators to compile for, which need not be present. TPUs: v5e:16x16 or v5p:8x8x8. GPUs:
    h100:8, h200:8, b200:8, or h100:8x8 for hosts × devices. Requires --compile-only, and the extra
    `tpu` or `gpu-compile`."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """A run on several hosts."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        Running.__post_init__(self)
        Training.__post_init__(self)
        check_different(self, "optimizers")
        if self.evaluation_tokens < self.context:
            raise ValueError(
                f"--evaluation-tokens must be at least --context {self.context}; got "
                f"{self.evaluation_tokens}."
            )
        if self.compile_only != (self.topology is not None):
            raise ValueError(
                "--compile-only and --topology require each other, as in --compile-only "
                "--topology v5p:4x4x4."
            )

    def folder(self, optimizer: OptimizerName | None = None) -> epath.Path:
        """Of the command, or of the run with one of its optimizers."""
        folder = epath.Path(self.out or Path("runs/pretrain") / self.preset)
        return folder / optimizer if optimizer and len(self.optimizers) > 1 else folder


def main() -> int:
    """Runs the command; returns its exit code."""
    return launch(parse, run)


def parse(arguments: list[str]) -> Command:
    """The command line; what it does not say is the preset's."""
    name = given_text(arguments, "--preset", PRESETS)
    suite = given_text(arguments, "--suite", get_args(SuiteName))
    preset = PRESETS.get(name)
    settings = defaults(suite, preset) if suite else vars(preset or PRESETS["tiny"])
    training = Training(**{f.name: settings[f.name] for f in dataclasses.fields(Training)})
    context = given(arguments, "--context", training.context)
    settings = (
        settings
        | vars(fitted(training, arguments))
        | {
            # One window is held out, at least.
            "evaluation_tokens": max(Running.evaluation_tokens, context)
        }
    )
    default = Command(preset=name or "tiny", **settings)
    return command_line.parse(Command, "python -m experiments.pretrain", arguments, default=default)


def run(command: Command, stop: threading.Event, console: Console) -> int:
    """Does what the command asks for."""
    if command.dry_run:
        from experiments.pretrain.dry_run import dry_run

        return dry_run(command, command.optimizers, console)
    if command.topology:
        from experiments.pretrain.pod import compile_only

        return compile_only(command.training(), command.optimizers, command.topology, console)
    if command.suite:
        study.check(command, command.suite)
    _check_folder(command)
    if command.suite:
        tokens = _prepare(command, stop, console)
        return study.suite(command, command.suite, tokens, console, stop)
    step.check(command.training(), make_mesh(command.mesh.sizes))
    config = command.training()
    with contextlib.ExitStack() as stack:
        for optimizer in command.optimizers:  # before what takes long
            folder = command.folder(optimizer)
            stack.enter_context(claimed(folder, settings_of(optimizer, config)))
        tokens = _prepare(command, stop, console)
        for optimizer in command.optimizers:
            folder = command.folder(optimizer)
            with progress_bar(console) as bar:
                run = Pretraining(
                    config,
                    optimizer,
                    command,
                    tokens,
                    folder,
                    stop,
                    on_step=showing(optimizer, bar, config.steps),
                    on_message=functools.partial(console.print, highlight=False),
                )
                if not run.to_the_end():
                    raise KeyboardInterrupt
    if jax.process_index() == 0:
        from experiments.report.studies import show

        show(command.folder(), console, optimizers=command.optimizers)
    return 0


def _check_folder(command: Command) -> None:
    """Refuses, before any work, an --out with something else in it than runs of this study."""
    folder = command.folder()
    if command.suite:
        folder = epath.Path(command.out or f"runs/pretrain/suite-{command.suite}")
    settings = settings_of(command.optimizers[0], command)
    if command.suite or len(command.optimizers) == 1:
        check_free(folder, settings, other="another --out")
    elif holds_run(folder):
        raise RunError(
            f"{folder} holds a run of one optimizer, but several require a folder each in --out. "
            "Give another --out, or only that run's optimizer as --optimizers."
        )
    else:
        check_group(folder, ARMS, settings, other="another --out")


def _prepare(command: Command, stop: threading.Event, console: Console) -> data.Tokens:
    with preparing("reading the text", stop, console) as show:
        tokens = data.prepare(command.data, show)
    facts = tokens.as_json()
    console.print(
        f"{facts['name']}: {facts['train_tokens']:,} training tokens, "
        f"{facts['validation_tokens']:,} held out.",
        highlight=False,
    )
    return tokens


if __name__ == "__main__":
    sys.exit(main())
