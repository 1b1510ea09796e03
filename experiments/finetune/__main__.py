"""`python -m experiments.finetune`: fine-tunes a Qwen3 with each arm, and compares them."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

from experiments.commands import guard, progress_bar, stop_on_signals
from experiments.finetune import architecture as config_json
from experiments.finetune import base, data, loop, plan, step, weights
from experiments.finetune.architecture import Qwen3
from experiments.finetune.arms import ARMS
from experiments.finetune.chat import Chat
from experiments.finetune.command import Command, parse
from experiments.finetune.config import (
    REAL_WARMUP,
    WARMUP,
    ArmName,
    Training,
)
from experiments.finetune.model import Params
from experiments.finetune.step import Trainer
from experiments.finetune.suites.study import suite
from experiments.language import hugging_face, planning
from experiments.language.hugging_face import CONFIG
from experiments.language.mesh import make_mesh, one_device
from experiments.language.training_loop import Progress
from experiments.parallel import devices_for, one_cpu_device_per_core, run_in_parallel
from experiments.programs import keep_compiled_programs
from experiments.report.figures import LABELS
from experiments.report.studies import show
from experiments.runs import check_free, check_group, claim, leave_nothing_of_no_run
from experiments.topology import leave_accelerators_alone


def main() -> int:
    """Runs the command; returns its exit code."""
    one_cpu_device_per_core()
    keep_compiled_programs()
    console = Console()
    stop = stop_on_signals()

    def work() -> int:
        command = parse(sys.argv[1:])
        if command.topology:
            leave_accelerators_alone()
        command.processes.join()
        if jax.process_index() > 0:
            console.quiet = True
        return run(command, stop, console)

    return guard(work)


def run(command: Command, stop: threading.Event, console: Console) -> int:
    """Does what the command asks for."""
    if command.model is not None:
        _check_folder(command.model)
    if command.data is not None:
        data.located(command.data)
    if command.suite:
        plan.plan_suite(command, command.suite, console)
        if command.dry_run:
            return 0
        check_free(epath.Path(command.out), command.as_json(), other="another --out")
        return suite(command, command.suite, console, stop)
    if command.dry_run or command.compile_only:
        return plan.plan(command, console)
    check_group(epath.Path(command.out), ARMS, command.as_json(), other="another --out")
    if command.model is None:  # before minutes of pretraining
        _check(command, base.architecture_of(command.base, command.base.vocabulary))
    start, rows, folder = _prepare(command, stop, console)
    windows = loop.batches(rows.train, command, 0).windows
    config = command.training().with_steps(
        windows, WARMUP if command.model is None else REAL_WARMUP
    )
    alone = plan.apart(command)
    places = devices_for(len(command.optimizers)) if alone else [None]
    meshes = (
        {device: one_device(device) for device in places}
        if alone
        else {None: make_mesh(config.mesh.sizes)}
    )
    made = functools.cache(
        lambda arm, device: Trainer(config, arm, start.architecture, meshes[device])
    )
    first = next(iter(meshes))
    limit = command.limit(meshes[first], len(places))
    trainers = [made(arm, first) for arm in command.optimizers]
    plan.refuse_too_large(command, trainers, limit, console)
    try:
        with progress_bar(console) as bar:
            messages = functools.partial(bar.console.print, highlight=False)

            def work(arm: ArmName, device: jax.Device | None) -> None:
                trainer = made(arm, device)
                _train(command, config, trainer, limit, start, rows, folder, stop, bar, messages)

            if alone:
                run_in_parallel(command.optimizers, lambda arm: arm, work, stop)
            else:
                for arm in command.optimizers:
                    work(arm, None)
    except KeyboardInterrupt:
        _tell(command, console)
        raise
    _tell(command, console)
    return 0


def _tell(command: Command, console: Console) -> None:
    """The table and the report of the arms that have begun."""
    begun = [arm for arm in command.optimizers if (command.folder(arm) / "metrics.jsonl").exists()]
    if jax.process_index() == 0 and begun:
        show(command.out, console, arms=begun)


def _prepare(
    command: Command, stop: threading.Event, console: Console
) -> tuple[loop.Start, data.Prepared, Path]:
    """The model, the rows, and the model's folder."""
    with progress_bar(console) as bar:
        task = bar.add_task("reading the model", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            bar.update(task, description=what, completed=done, total=total)

        if command.model is None:
            if jax.process_count() > 1:
                raise ValueError("A run of several processes requires --model.")
            folder = base.prepare(command.base, show)
        else:
            folder = Path(command.model).expanduser()
        architecture = config_json.read(folder / CONFIG)
        _check(command, architecture)
        weights.check(folder, architecture)  # before what takes long, and before --out is claimed
        chat = Chat(folder)
        if chat.vocabulary > architecture.vocabulary:
            raise ValueError(
                f"{folder}: the tokenizer has {chat.vocabulary} tokens, and the model "
                f"{architecture.vocabulary}. The files are of different models."
            )
        rows = data.prepare(
            command.data,
            chat,
            command.context,
            on_progress=lambda done: show(f"reading rows, {done:,}", done, None),
        )
    report = rows.report
    dropped = (
        f", {report.dropped:,} reasoning texts or remarks beside a tool call dropped by the chat "
        "template"
    )
    console.print(
        f"{report.name}: {report.rows:,} examples, {report.tokens:,} tokens, {report.learnt:,} "
        f"of them trained on; {report.held_out_rows:,} examples held out, {report.truncated:,} "
        f"truncated to {command.context:,} tokens, {report.too_long:,} left "
        f"out{dropped if report.dropped else ''}.",
        highlight=False,
    )

    def load(mesh: jax.sharding.Mesh) -> Params:
        return weights.read(folder, mesh)[1]

    return loop.Start(hugging_face.fingerprint(folder), architecture, load), rows, folder


def _check(command: Command, architecture: Qwen3) -> None:
    """Raises a ValueError where the mesh does not divide the batch or the model."""
    if not plan.apart(command):
        step.check(command.training(), architecture, make_mesh(command.mesh.sizes))


def _check_folder(model: str) -> None:
    """Raises a ValueError where --model names no folder with a model."""
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():
        return
    # What looks like a name on the Hub most likely is one.
    name = model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else "Qwen/Qwen3-0.6B"
    raise ValueError(
        f"--model must be a local folder with a Qwen3's {CONFIG}, safetensors and tokenizer; "
        f"{model} {f'has no {CONFIG}' if folder.is_dir() else 'is not a folder here'}. `hf "
        f"download {name} --local-dir {name.split('/')[1]}` downloads one."
    )


def _train(
    command: Command,
    config: Training,
    trainer: Trainer,
    limit: int | None,
    start: loop.Start,
    rows: data.Prepared,
    source: Path,
    stop: threading.Event,
    bar: Bar,
    on_message: Callable[[str], None],
) -> None:
    arm, folder = trainer.name, command.folder(trainer.name)
    settings = loop.settings_of(trainer, start, rows)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            new = not (folder / "config.json").exists()
            lock = claim(folder, settings, ("mesh",), other="another --out")
            stack.enter_context(contextlib.closing(lock))
            if new:
                stack.callback(leave_nothing_of_no_run, folder)
        if (folder / "summary.json").exists():
            on_message(f"{LABELS.get(arm, arm)}: already finished, in {folder}")
            return
        task = bar.add_task(f"{arm}: compiling", total=config.steps)
        planning.check(plan.case(trainer), limit, planning.compiled_bytes(trainer.program))

        def finish(params: Params) -> None:
            if command.exports and not (folder / "model").exists():
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


if __name__ == "__main__":
    sys.exit(main())
