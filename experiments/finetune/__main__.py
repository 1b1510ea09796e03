"""`python -m experiments.finetune`: fine-tunes a model with each optimizer, and compares them."""

from experiments.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before the imports, which take seconds

import functools
import re
import sys
import threading
from pathlib import Path

import jax
from etils import epath
from rich.console import Console
from rich.progress import Progress as Bar

from experiments.commands import progress_bar
from experiments.finetune import architecture as config_json
from experiments.finetune import arms, base, data, instructions, loop, model, plan, step, weights
from experiments.finetune.architecture import Architecture
from experiments.finetune.arms import ARMS
from experiments.finetune.command import Command, parse
from experiments.finetune.config import REAL_WARMUP, WARMUP, ArmName, Training
from experiments.finetune.model import Params
from experiments.finetune.step import Trainer
from experiments.finetune.suites.study import suite
from experiments.language import hugging_face, planning
from experiments.language.hugging_face import CONFIG
from experiments.language.launch import claimed, launch, preparing, showing
from experiments.language.mesh import make_mesh, one_device
from experiments.parallel import devices_for, one_cpu_device_per_core, run_in_parallel
from experiments.report.names import optimizer_label
from experiments.report.studies import show
from experiments.runs import check_free, check_group


def main() -> int:
    """Runs the command; returns its exit code."""
    one_cpu_device_per_core()
    return launch(parse, run)


def run(command: Command, stop: threading.Event, console: Console) -> int:
    """Fine-tunes, plans, compiles or runs a suite, as the command says; returns its exit code."""
    if command.model is not None:
        _check_folder(command.model)
    if command.data not in (None, instructions.INSTALLED):
        data.located(command.data)
    if command.suite:
        plan.plan_suite(command, console)
        if command.dry_run:
            return 0
        check_free(epath.Path(command.out), command.as_json())
        return suite(command, console, stop)
    if command.dry_run or command.compile_only:
        return plan.plan(command, console)
    check_group(epath.Path(command.out), ARMS, command.as_json())
    if command.model is None:  # before minutes of pretraining
        _check(command, base.architecture_of(command.base, command.base.vocabulary))
    start, rows, folder = _prepare(command, stop, console)
    windows = loop.batches(rows.train, command, 0).windows
    config = command.training().with_steps(
        windows, WARMUP if command.model is None else REAL_WARMUP
    )
    alone = plan.apart(command)
    places = devices_for(len(command.optimizers)) if alone else [None]
    mesh_of = functools.cache(
        lambda device: one_device(device) if alone else make_mesh(config.mesh.sizes)
    )
    trainer_of = functools.cache(
        lambda arm, device: Trainer(config, arm, start.architecture, mesh_of(device))
    )
    limit = command.limit(mesh_of(places[0]), len(places))
    trainers = [trainer_of(arm, places[0]) for arm in command.optimizers]
    plan.refuse_too_large(command, trainers, limit, console)
    try:
        with progress_bar(console) as bar:

            def work(arm: ArmName, device: jax.Device | None = None) -> None:
                _train(command, trainer_of(arm, device), limit, start, rows, folder, stop, bar)

            if alone:
                run_in_parallel(command.optimizers, lambda arm: arm, work, stop)
            else:
                for arm in command.optimizers:
                    work(arm)
    except KeyboardInterrupt:
        stop.set()
    begun = [arm for arm in command.optimizers if (command.folder(arm) / "metrics.jsonl").exists()]
    if jax.process_index() == 0 and begun:
        show(command.out, console, arms=begun)
    if stop.is_set():
        raise KeyboardInterrupt
    return 0


def _prepare(
    command: Command, stop: threading.Event, console: Console
) -> tuple[loop.Start, data.Prepared, Path]:
    """Returns the initial model, the examples, and the model's folder."""
    with preparing("reading the model", stop, console) as show:
        if command.model is None:
            if jax.process_count() > 1:
                raise ValueError("A run of several processes requires --model.")
            folder = base.prepare(command.base, show)
        else:
            folder = Path(command.model).expanduser()
        architecture = config_json.read(folder / CONFIG)
        _check(command, architecture)
        weights.check(folder, architecture)  # before slow work, and before --out is claimed
        rows = data.read(command, folder, architecture, show)
    console.print(rows.report.text(command.context), highlight=False)
    name, text = hugging_face.fingerprint(folder), data.pretraining_text(command, folder)
    start = loop.Start(name, architecture, lambda mesh: weights.read(folder, mesh)[1], text)
    return start, rows, folder


def _check(command: Command, architecture: Architecture) -> None:
    """Raises a ValueError of LoRA, or where the mesh does not divide the batch or the model."""
    model.shapes(architecture, command.lora)
    for arm in command.optimizers:
        arms.check(arm, command.training(), architecture)
    if not plan.apart(command):
        step.check(command.training(), architecture, make_mesh(command.mesh.sizes))


def _check_folder(model: str) -> None:
    """Checks that --model is a folder with a model."""
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():
        return
    # A text like OWNER/NAME is probably the name of a model on the Hub.
    name = model if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else "Qwen/Qwen3-0.6B"
    raise ValueError(
        f"--model must be a local folder with a model's {CONFIG}, safetensors and tokenizer; "
        f"{model} {f'has no {CONFIG}' if folder.is_dir() else 'is not a folder here'}. `hf "
        f"download {name} --local-dir {name.split('/')[1]}` downloads one."
    )


def _train(
    command: Command,
    trainer: Trainer,
    limit: int | None,
    start: loop.Start,
    rows: data.Prepared,
    source: Path,
    stop: threading.Event,
    bar: Bar,
) -> None:
    arm, folder = trainer.name, command.folder(trainer.name)
    on_message = functools.partial(bar.console.print, highlight=False)
    with claimed(folder, loop.settings_of(trainer, start, rows), Training().as_json()):
        if (folder / "summary.json").exists():
            on_message(f"{optimizer_label(arm)}: already finished, in {folder}")
            return
        on_step = showing(arm, bar, trainer.config.steps)
        planning.check(plan.case(trainer), limit, planning.compiled_bytes(trainer.program))

        def finish(params: Params) -> None:
            exported = Path(folder) / "model"
            if command.exports and not exported.exists():
                given = trainer.architecture, params, source, trainer.config.dtype
                weights.write(exported, *given, card=run.write_card)

        callbacks = {"on_step": on_step, "on_message": on_message, "on_finish": finish}
        run = loop.FineTuning(trainer, command, rows, start, folder, stop, **callbacks)
        if not run.to_the_end():
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
