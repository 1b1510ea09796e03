"""`python -m experiments.finetune`: fine-tunes a Qwen3 with each arm, and compares them."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import jax
import tyro
from etils import epath
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

from experiments.commands import INTERRUPTED, print_error, progress_bar, stop_on_signals
from experiments.figures import LABELS
from experiments.finetune import architecture as config_json
from experiments.finetune import base, data, loop, memory, report, weights
from experiments.finetune.architecture import PRESETS, Qwen3
from experiments.finetune.chat import Chat
from experiments.finetune.config import ArmName, Base, Optimizer, Running, Training
from experiments.finetune.model import Params
from experiments.finetune.report_data import load_run
from experiments.finetune.step import Trainer
from experiments.finetune.suites.config import Suite, SuiteName, defaults
from experiments.finetune.suites.study import suite
from experiments.language.hugging_face import CONFIG
from experiments.language.mesh import Mesh, make_mesh, mesh_of_config, one_device
from experiments.language.processes import Processes
from experiments.language.training_loop import Progress, TrainingError
from experiments.runs import RunError, claim
from experiments.side_by_side import a_device_for_each_core, devices_for, side_by_side

# What fine-tuning a real model begins with: less to hold, longer windows, a rate for one.
_REAL = Training(
    optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.01, ns_dtype="bfloat16"),
    context=2048,
    batch=8,
    warmup=20,
    dtype="bfloat16",
)
_SMALL = Training(batch=4, steps=200, warmup=10, remat=False)
# With no argument it is to take five minutes on two cores.
_SHORT = {"steps": 100, "evaluation_tokens": 16_384}
_MADE_UP_STEPS = 1000  # of a dry run, whose rows are not read


@dataclasses.dataclass(frozen=True)
class Command(Suite, Running, Training):
    """Fine-tunes a Qwen3 with AdamW and three forms of Muon, from equal starts on equal rows.

    With no argument: pretrains a small Qwen3 (once; it is kept), fine-tunes it with the four arms
    side by side to write the bodies of documented Python functions, and prints what came out, all
    within some minutes on two cores. `--model FOLDER --data FILE` fine-tunes a model of Hugging
    Face's on your own rows, every param of it; the memory that takes is told before it is
    allocated. Each arm's folder in --out has `metrics.jsonl`, `summary.json` and checkpoints, and
    the same command goes on with it, bit for bit, after Ctrl-C, SIGTERM (both save first and exit
    with 130), a crash or a kill.
    """

    model: str | None = None
    """A folder with config.json, safetensors and tokenizer of a Qwen3; by default the small one."""
    data: str | None = None
    """Rows with "messages", or "prompt" and "completion", as .jsonl, .jsonl.gz or .parquet; by
    default functions of the Python packages that are installed."""
    arms: tuple[ArmName, ...] = ("adamw", "muon_frozen1d", "muon_adamw", "muonclip")
    """Which to compare; each has a folder of its own in --out."""
    base: Base = dataclasses.field(default_factory=Base)
    """The small model, where there is no --model."""
    out: str = "runs/finetune/study"
    """Where the arms' folders are."""
    export: bool | None = None
    """Write the fine-tuned model, with its tokenizer, to `model` in the arm's folder; by default of
    a --model."""
    dry_run: bool = False
    """Print what a step takes of a device's memory, refuse what does not fit, and end."""
    preset: Literal["0.6b", "1.7b", "4b"] | None = None
    """Of --dry-run: a Qwen3 of that size, which need not be here."""
    device_memory: float | None = None
    """Gigabytes that a device has; by default it is asked."""
    processes: Processes = dataclasses.field(default_factory=Processes)
    """A run on many hosts."""

    def __post_init__(self) -> None:
        Suite.__post_init__(self)
        Running.__post_init__(self)
        Training.__post_init__(self)
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"--arms names one or more, each once; got {self.arms}.")
        if self.preset and not self.dry_run:
            raise ValueError(
                "--preset is of --dry-run; to train, give --model with the folder of such a model."
            )
        if self.preset and self.model:
            raise ValueError("Give --preset or --model, not both.")
        if self.device_memory is not None and not self.device_memory > 0:
            raise ValueError(f"--device-memory is above 0 gigabytes, got {self.device_memory:g}.")

    def folder(self, arm: ArmName) -> epath.Path:
        """Of the run with an arm."""
        return epath.Path(self.out) / arm


def main() -> int:
    """Runs the command; returns its exit code."""
    a_device_for_each_core()
    console = Console()
    stop = stop_on_signals()
    try:
        command = parse(sys.argv[1:])
        command.processes.join()
        if jax.process_index() > 0:
            console.quiet = True
        return run(command, stop, console)
    except KeyboardInterrupt:
        console.print("Stopped and saved; the same command goes on from there.")
        return INTERRUPTED
    except (ValueError, RunError, TrainingError, OSError) as error:
        print_error(error)
        return 1 if isinstance(error, (TrainingError, OSError)) else 2


def parse(arguments: list[str]) -> Command:
    """The command line; what it does not say is that of a real model or of the small one."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--model")
    early.add_argument("--preset")
    early.add_argument("--suite", choices=get_args(SuiteName))
    named, _ = early.parse_known_args([a for a in arguments if a not in ("-h", "--help")])
    real = bool(named.model or named.preset)
    preset = _REAL if real else _SMALL
    settings = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Training)}
    if named.suite:
        settings |= defaults(named.suite)
    elif not real:
        settings |= _SHORT
    return tyro.cli(
        Command, args=arguments, default=Command(**settings), prog="python -m experiments.finetune"
    )


def run(command: Command, stop: threading.Event, console: Console) -> int:
    """Does what the command asks for."""
    if command.dry_run:
        return _dry_run(command, console)
    if command.suite:
        return suite(command, command.suite, console, stop)
    start, rows, folder = _prepare(command, stop, console)
    config = command.training().with_steps(loop.batches(rows.train, command, 0).windows)
    alone = _apart(command)
    meshes = (
        {device: one_device(device) for device in devices_for(len(command.arms))}
        if alone
        else {None: make_mesh(config.mesh.sizes)}
    )
    made = functools.cache(
        lambda arm, device: Trainer(config, arm, start.architecture, meshes[device])
    )
    limit = _limit(command, len(meshes))
    first = next(iter(meshes))
    memory.show({arm: made(arm, first) for arm in command.arms}, limit, console)
    for arm in command.arms:
        memory.check(made(arm, first), limit)
    try:
        with progress_bar(console) as bar:
            messages = functools.partial(bar.console.print, highlight=False)

            def work(arm: ArmName, device: jax.Device | None) -> None:
                trainer = made(arm, device)
                _train(command, config, trainer, limit, start, rows, folder, stop, bar, messages)

            if alone:
                side_by_side(command.arms, lambda arm: arm, work, stop)
            else:
                for arm in command.arms:
                    work(arm, None)
    except KeyboardInterrupt:
        _tell(command, console)
        raise
    _tell(command, console)
    return 0


def _tell(command: Command, console: Console) -> None:
    """The table and the report of the arms that have begun."""
    begun = [arm for arm in command.arms if (command.folder(arm) / "metrics.jsonl").exists()]
    if jax.process_index() == 0 and begun:
        page = report.write_report(epath.Path(command.out), begun)
        console.print(report.terminal_table([load_run(command.folder(arm)) for arm in begun]))
        console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _prepare(
    command: Command, stop: threading.Event, console: Console
) -> tuple[loop.Start, data.Prepared, Path]:
    """The model, the rows, and the model's folder."""
    with progress_bar(console) as bar:
        task = bar.add_task("looking at the model", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            bar.update(task, description=what, completed=done, total=total)

        if command.model is None:
            if jax.process_count() > 1:
                raise ValueError("A run of several processes needs a --model.")
            folder = base.prepare(command.base, show)
        else:
            folder = Path(command.model).expanduser()
        architecture = config_json.read(folder / CONFIG)
        chat = Chat(folder)
        if chat.vocabulary > architecture.vocabulary:
            raise ValueError(
                f"{folder}: the tokenizer has {chat.vocabulary} tokens, and the model "
                f"{architecture.vocabulary}. They are not of one model."
            )
        rows = data.prepare(
            command.data,
            chat,
            command.context,
            on_progress=lambda done: show(f"reading rows, {done:,}", done, None),
        )
    report = rows.report
    console.print(
        f"{report.name}: {report.rows:,} rows, {report.tokens:,} tokens, {report.learnt:,} of "
        f"these to learn; {report.held_out_rows:,} rows held out, {report.truncated:,} cut at "
        f"{command.context:,} tokens, {report.too_long:,} left out.",
        highlight=False,
    )

    def load(mesh: jax.sharding.Mesh) -> Params:
        return weights.read(folder, mesh)[1]

    return loop.Start(_fingerprint(folder), architecture, load), rows, folder


def _fingerprint(folder: Path) -> str:
    """The model's name, and a digest of its config and tensors: arms begin with equal ones."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{folder.name} {digest.hexdigest()[:12]}"


def _train(
    command: Command,
    config: Training,
    trainer: Trainer,
    limit: int,
    start: loop.Start,
    rows: data.Prepared,
    source: Path,
    stop: threading.Event,
    bar: Bar,
    on_message: Callable[[str], None],
) -> None:
    arm, folder = trainer.name, command.folder(trainer.name)
    exports = command.model is not None if command.export is None else command.export
    settings = {"arm": arm, "model": start.name, "data": rows.report.sha256} | config.as_json()
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            lock = claim(folder, settings, ("mesh",), other="another --out")
            stack.enter_context(contextlib.closing(lock))
        if (folder / "summary.json").exists():
            on_message(f"{LABELS.get(arm, arm)}: finished before, in {folder}")
            return
        task = bar.add_task(f"{arm}: compiling", total=config.steps)
        memory.check(trainer, limit, memory.compiled(trainer))

        def finish(params: Params) -> None:
            if exports and not (folder / "model").exists():
                weights.write(
                    Path(folder) / "model", trainer.architecture, params, source, config.dtype
                )

        finished = loop.train(
            trainer,
            command,
            rows,
            start,
            folder,
            stop,
            functools.partial(_show, arm, bar, task),
            on_message,
            finish,
        )
        bar.remove_task(task)
        if not finished:
            raise KeyboardInterrupt


def _show(arm: str, bar: Bar, task: TaskID, progress: Progress) -> None:
    parts = [f"{arm}: step {progress.step}", f"loss {progress.loss:.3f}"]
    if progress.held_out is not None:
        parts.append(f"held out {progress.held_out:.3f}")
    bar.update(task, completed=progress.step, description=" · ".join(parts))


def _apart(command: Command) -> bool:
    """Whether each arm has a device of its own, and does not share all of them in its turn."""
    return jax.default_backend() == "cpu" and command.mesh == Mesh() and jax.process_count() == 1


def _limit(command: Command, sharing: int) -> int:
    if command.device_memory is not None:
        return round(command.device_memory * 1e9)
    return memory.device_memory(jax.local_devices()[0], sharing)


def _dry_run(command: Command, console: Console) -> int:
    """Prints the plan; raises `memory.TooLarge` if an arm does not fit."""
    config = command.training().with_steps(_MADE_UP_STEPS * command.batch)
    mesh = mesh_of_config(command.mesh)
    if _apart(command):
        mesh = one_device()
    architecture = _architecture(command)
    trainers = {arm: Trainer(config, arm, architecture, mesh) for arm in command.arms}
    limit = _limit(command, len(devices_for(len(trainers))))
    memory.show(trainers, limit, console)
    for trainer in trainers.values():
        memory.check(trainer, limit)
    return 0


def _architecture(command: Command) -> Qwen3:
    if command.preset:
        return PRESETS[command.preset]
    if command.model:
        return config_json.read(Path(command.model).expanduser() / CONFIG)
    return base.architecture_of(command.base, command.base.vocabulary)


if __name__ == "__main__":
    sys.exit(main())
