"""What a command's trainings take of a device's memory, told and judged before they begin."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.console import Console

from experiments.compiled import measure
from experiments.finetune import architecture as config_json
from experiments.finetune import base, memory
from experiments.finetune.architecture import PRESETS, Qwen3
from experiments.finetune.command import Command
from experiments.finetune.config import ArmName, Base
from experiments.finetune.step import Trainer
from experiments.finetune.suites.config import SuiteName, variants
from experiments.language.hugging_face import CONFIG
from experiments.language.kernels import Shape, with_attention
from experiments.language.mesh import Mesh, make_mesh, mesh_of_config, one_device
from experiments.language.sharding import RULES
from experiments.parallel import devices_for
from experiments.report.figures import LABELS
from experiments.roofline import print_programs
from experiments.topology import MEMORY, topology_devices

_MADE_UP_STEPS = 1000  # of a dry run, whose rows are not read


def dry_run(command: Command, console: Console) -> int:
    """Prints the plan; raises `memory.TooLarge` if an arm does not fit."""
    if command.topology:
        return compile_for(command, command.topology, console)
    config = command.training().with_steps(_MADE_UP_STEPS * command.batch)
    mesh = one_device() if apart(command) else mesh_of_config(command.mesh)
    architecture = _architecture(command, command.base)
    trainers = {arm: Trainer(config, arm, architecture, mesh) for arm in command.optimizers}
    plan(command, trainers, limit_of(command, len(devices_for(len(trainers)))), console)
    return 0


def compile_for(command: Command, topology: str, console: Console) -> int:
    """Prints the plan on a topology's devices, and what the compiled steps take of one.

    Raises:
        TopologyError: the compiler is missing, or knows no such topology.
        memory.TooLarge: an arm does not fit, by its plan or when it is compiled.
        ValueError: an axis that the mesh does not divide.
    """
    devices = topology_devices(topology)
    kind = devices[0].device_kind
    mesh = make_mesh(command.mesh.sizes, devices)
    config = command.training().with_steps(_MADE_UP_STEPS * command.batch)
    architecture = _architecture(command, command.base)
    trainers = {arm: Trainer(config, arm, architecture, mesh) for arm in command.optimizers}
    if command.device_memory is not None:
        limit = round(command.device_memory * 1e9)
    else:
        limit = round(MEMORY[kind] * 2**30)
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    memory.show(trainers, limit, console, f"{topology} ({kind}), {sizes}")
    for trainer in trainers.values():
        memory.check(trainer, limit)
    shape = Shape(
        sequences=config.microbatch // math.prod(mesh.shape[a] for a in RULES["batch"]),
        heads=architecture.heads // mesh.shape["tensor"],
        length=config.context,
        key=architecture.head_dim,
        value=architecture.head_dim,
    )
    programs = {}
    for arm, trainer in trainers.items():
        with console.status(f"{arm}: compiling for {topology} (takes minutes)"):
            programs[LABELS.get(arm, arm)] = with_attention(measure(trainer.program), shape)
        memory.check(trainer, limit, memory.compiled(trainer))
    print_programs(programs, kind, console)
    return 0


def plan(
    command: Command, trainers: Mapping[ArmName, Trainer], limit: int, console: Console
) -> None:
    """Prints what arms take of a device's memory; raises `memory.TooLarge` if one does not fit."""
    _warn_of_context(command, next(iter(trainers.values())).architecture, console)
    at_once = len(devices_for(len(trainers)))
    where = f"one device for each optimizer, {at_once} at a time" if apart(command) else None
    memory.show(trainers, limit, console, where)
    for trainer in trainers.values():
        memory.check(trainer, limit)


def plan_suite(command: Command, which: SuiteName, console: Console) -> None:
    """The same of each variant's arms; those that take what others did are only named."""
    planned = variants(command, which)
    trainers = {
        name: {
            arm: Trainer(
                of.training.with_steps(_MADE_UP_STEPS * command.batch),
                arm,
                _architecture(command, of.base or command.base),
                one_device(),
            )
            for arm in of.arms
        }
        for name, of in planned.items()
    }
    every = [trainer for of in trainers.values() for trainer in of.values()]
    _warn_of_context(command, every[0].architecture, console)
    at_once = len(devices_for(command.seeds * len(every)))
    limit = limit_of(command, at_once)
    told: list[tuple[ArmName, memory.Plan]] = []
    same = []
    for name, of in trainers.items():
        new = {arm: t for arm, t in of.items() if (arm, memory.plan(t)) not in told}
        told += [(arm, memory.plan(t)) for arm, t in new.items()]
        if new:
            console.print(f"[bold]{name}[/bold]", highlight=False)
            where = f"one device for each training, {at_once} at a time"
            memory.show(new, limit, console, where)
        else:
            same.append(name)
    if same:
        console.print(f"The same memory is required by: {', '.join(same)}.", highlight=False)
    large = {t.name for t in every if memory.plan(t).total > limit}
    choice = () if which == "qk" else [arm for arm in command.optimizers if arm not in large]
    for trainer in every:
        memory.check(trainer, limit, choice=choice, shared=False)


def apart(command: Command) -> bool:
    """Whether each arm has a device of its own, and does not share all of them in its turn."""
    return jax.default_backend() == "cpu" and command.mesh == Mesh() and jax.process_count() == 1


def limit_of(command: Command, sharing: int) -> int:
    if command.device_memory is not None:
        return round(command.device_memory * 1e9)
    return memory.device_memory(jax.local_devices()[0], sharing)


def _warn_of_context(command: Command, architecture: Qwen3, console: Console) -> None:
    if command.context > architecture.context:
        console.print(
            f"[yellow]warning:[/yellow] --context {command.context:,} exceeds the model's "
            f"max_position_embeddings {architecture.context:,}, so it will see RoPE positions "
            "that it was not trained on.",
            highlight=False,
        )


def _architecture(command: Command, small: Base) -> Qwen3:
    """Of --preset or --model; without these of a small model."""
    if command.preset:
        return PRESETS[command.preset]
    if command.model is not None:
        return config_json.read(Path(command.model).expanduser() / CONFIG)
    return base.architecture_of(small, small.vocabulary)
