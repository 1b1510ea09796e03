"""`python -m experiments.pretrain`: trains, resumes, compares and plans language models."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import dataclasses
import functools
import sys
import threading
from pathlib import Path
from typing import Annotated, get_args

import jax
import tyro
from etils import epath
from rich.console import Console

from experiments import command_line
from experiments.commands import progress_bar
from experiments.language import data, hugging_face, planning
from experiments.language.compile_only import compile_only
from experiments.language.dry_run import dry_run
from experiments.language.launch import claimed, launch, preparing, showing
from experiments.language.mesh import make_mesh, mesh_of_config
from experiments.language.planning import Case, Planning
from experiments.language.processes import Processes
from experiments.optimizers import ARMS, OptimizerName
from experiments.pretrain import plan, start, step
from experiments.pretrain.config import PresetName, Running, Training, as_json
from experiments.pretrain.loop import Pretraining
from experiments.pretrain.presets import PRESETS, fitted
from experiments.pretrain.suites import study
from experiments.pretrain.suites.config import Suite, SuiteName, defaults
from experiments.pretrain.trained import settings_of
from experiments.runs import RunError, check_free, check_group, holds_run
from experiments.settings import check_different, given, given_text


@dataclasses.dataclass(frozen=True)
class Command(Suite, Planning, Running, Training):
    """Pretrains a mixture-of-experts language model with AdamW and with Muon.

    Without options, this trains a small model on the source of Python's standard library, once with
    each optimizer, and writes a report with loss curves in bits per byte and generated samples. It
    takes a few minutes on two CPU cores. `--preset` selects a larger model, `--data.files` trains
    on your own text, and `--suite` runs a study of many trainings. Run the same command again to
    resume, bit for bit, after Ctrl-C or SIGTERM (which save a checkpoint and exit with code 130),
    a crash or a kill.
    """

    preset: PresetName = "tiny"
    """Named settings. They are those of model, schedule and learning rates; explicit options
    override them."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Folder of a DeepSeek-V3, Llama or Qwen3 model (config.json and safetensors) to continue
    pretraining. The optimizer state starts fresh; the options set the schedule."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "muon")
    """Optimizers to compare. If there are several, each gets its own folder in --out."""
    out: str | None = None
    """Folder of the run. It may be in gs:// or s3://. By default runs/pretrain/PRESET."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """Training on several hosts."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        Planning.__post_init__(self)
        Running.__post_init__(self)
        Training.__post_init__(self)
        check_different(self, "optimizers")
        for name in self.optimizers:
            self.schedules.check(name)
        alone = {
            "--from": self.from_,
            "--rollback.above": self.rollback.above,
            "--isolate-documents": self.isolate_documents,
        }
        for name, value in alone.items():
            if value and self.suite:
                raise ValueError(f"{name} excludes --suite {self.suite}; remove one of them.")
        if self.evaluation_tokens < self.context:
            raise ValueError(
                f"--evaluation-tokens must be at least --context {self.context}; got "
                f"{self.evaluation_tokens}."
            )

    def folder(self, optimizer: OptimizerName | None = None) -> epath.Path:
        """Returns the command's folder, or the folder of the run with one of its optimizers."""
        folder = epath.Path(self.out or Path("runs/pretrain") / self.preset)
        return folder / optimizer if optimizer and len(self.optimizers) > 1 else folder


def main() -> int:
    """Runs the command; returns its exit code."""
    return launch(parse, run)


def parse(arguments: list[str]) -> Command:
    """Returns the command; options that are not given take the preset's values."""
    name = given_text(arguments, "--preset", PRESETS)
    suite = given_text(arguments, "--suite", get_args(SuiteName))
    origin = given_text(arguments, "--from")
    preset = PRESETS.get(name)
    settings = defaults(suite, preset) if suite else vars(preset or PRESETS["tiny"])
    training = Training(**{f.name: settings[f.name] for f in dataclasses.fields(Training)})
    if origin:
        training = start.fitted(training, Path(origin).expanduser())
    if text := given_text(arguments, "--data.tokenizer"):
        own = data.fitted(training.data, text, sized=not origin)
        training = dataclasses.replace(training, data=own)
    context = given(arguments, "--context", training.context)
    settings = (
        settings
        | vars(fitted(training, arguments))
        | {
            # At least one window is held out.
            "evaluation_tokens": max(Running.evaluation_tokens, context)
        }
    )
    default = Command(preset=name or "tiny", **settings)
    return command_line.parse(Command, "python -m experiments.pretrain", arguments, default=default)


def run(command: Command, stop: threading.Event, console: Console) -> int:
    """Trains, plans, compiles or runs a suite, as the command says; returns its exit code."""
    if command.dry_run or command.compile_only:
        return _plan(command, console)
    begin = None
    if command.from_:
        folder = Path(command.from_).expanduser()
        _check_start(command, folder, console)
        command = dataclasses.replace(command, origin=hugging_face.fingerprint(folder))
        begin = functools.partial(start.begin, folder=folder)
    if command.suite:
        study.check(command, command.suite)
    _check_folder(command)
    if command.suite:
        tokens = _prepare(command, stop, console)
        return study.suite(command, command.suite, tokens, console, stop)
    config = command.training()
    step.check(config, make_mesh(command.mesh.sizes))
    with contextlib.ExitStack() as stack:
        for optimizer in command.optimizers:  # before what takes long
            folder, settings = command.folder(optimizer), settings_of(optimizer, config)
            stack.enter_context(claimed(folder, settings, as_json(Training())))
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
                    begin=begin,
                    on_step=showing(optimizer, bar, config.steps),
                    on_message=functools.partial(console.print, highlight=False),
                )
                if not run.to_the_end():
                    raise KeyboardInterrupt
    if jax.process_index() == 0:
        from experiments.report.studies import show

        show(command.folder(), console, optimizers=command.optimizers)
    return 0


def _plan(command: Command, console: Console) -> int:
    config, names = command.training(), command.optimizers

    def cases(mesh: jax.sharding.Mesh) -> list[Case]:
        return [plan.case(config, name, mesh) for name in names]

    if command.compile_only:
        compile_only(command, config.mesh, cases, console)
    else:
        mesh = mesh_of_config(config.mesh)
        schedule = plan.schedule_text(config, names)
        dry_run(cases(mesh), command.limit(mesh), console, schedule=schedule)
    return 0


def _check_start(command: Command, folder: Path, console: Console) -> None:
    """Checks, before any work, that the --from model matches the command and fits the device."""
    config, mesh = command.training(), make_mesh(command.mesh.sizes)
    start.check(config, folder, console)
    for name in command.optimizers:
        planning.check(plan.case(config, name, mesh), command.limit(mesh))


def _check_folder(command: Command) -> None:
    """Checks, before any work, that --out holds nothing but runs of this study."""
    folder = command.folder()
    if command.suite:
        folder = epath.Path(command.out or f"runs/pretrain/suite-{command.suite}")
    settings = settings_of(command.optimizers[0], command)
    if command.suite or len(command.optimizers) == 1:
        check_free(folder, settings)
    elif holds_run(folder):
        raise RunError(
            f"{folder} holds a run of one optimizer, but several require a folder each in --out. "
            "Give another --out, or only that run's optimizer as --optimizers."
        )
    else:
        check_group(folder, ARMS, settings)


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
