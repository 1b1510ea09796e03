"""The facts of a fine-tuning to plan from, and the plans of a command and of its suites."""

import functools
import math
from collections.abc import Iterable
from pathlib import Path

import jax
from rich.console import Console

from experiments.finetune import architecture as config_json
from experiments.finetune import arms, base
from experiments.finetune.architecture import PRESETS, Architecture
from experiments.finetune.command import Command
from experiments.finetune.config import ArmName, Base, Training
from experiments.finetune.model import Params
from experiments.finetune.step import Trainer
from experiments.finetune.suites.config import variants
from experiments.language import sharding, vocabulary
from experiments.language.compile_only import compile_only
from experiments.language.dry_run import dry_run, show_memory
from experiments.language.hugging_face import CONFIG
from experiments.language.mesh import Mesh, mesh_of_config, one_device
from experiments.language.planning import Case, Memory, check, warn_of_context
from experiments.language.sharding import on_device
from experiments.parallel import devices_for

_MATRICES = "kernel", "lora_a", "lora_b"
_MADE_UP_STEPS = 1000  # steps of a plan, which does not read the examples


def plan(command: Command, console: Console) -> int:
    """Prints the plan of a step. Raises `planning.TooLarge` if an arm does not fit."""
    config = command.training().with_steps(_MADE_UP_STEPS * command.batch)
    architecture = _architecture(command, command.base)

    def cases(mesh: jax.sharding.Mesh) -> list[Case]:
        return [case_of(config, arm, mesh, architecture) for arm in command.optimizers]

    if command.compile_only:
        compile_only(command, command.mesh, cases, console)
        return 0
    warn_of_context(command.context, architecture.context, console)
    mesh = one_device() if apart(command) else mesh_of_config(command.mesh)
    at_once = len(devices_for(len(command.optimizers)))
    dry_run(cases(mesh), command.limit(mesh, at_once), console, _where(command, at_once))
    return 0


def refuse_too_large(
    command: Command, trainers: Iterable[Trainer], limit: int | None, console: Console
) -> None:
    """Prints the memory of trainings, and checks that they fit the device."""
    cases = list(map(case, trainers))
    warn_of_context(command.context, cases[0].trainer.architecture.context, console)
    show_memory(cases, limit, console, _where(command, len(devices_for(len(cases)))))
    for one in cases:
        check(one, limit)


def plan_suite(command: Command, console: Console) -> None:
    """Prints the memory of each variant's arms, and names variants with equal memory only."""
    cases = {}
    for name, of in variants(command).items():
        config = of.training.with_steps(_MADE_UP_STEPS * command.batch)
        given = one_device(), _architecture(command, of.base or command.base)
        cases[name] = [case_of(config, arm, *given) for arm in of.arms]
    every = [one for of in cases.values() for one in of]
    warn_of_context(command.context, every[0].trainer.architecture.context, console)
    at_once = len(devices_for(command.seeds * len(every)))
    limit = command.limit(one_device(), at_once)
    shown: list[tuple[ArmName, Memory]] = []
    same = []
    for name, of in cases.items():
        new = [one for one in of if (one.name, one.memory) not in shown]
        shown += [(one.name, one.memory) for one in new]
        if new:
            console.print(f"[bold]{name}[/bold]", highlight=False)
            show_memory(new, limit, console, f"one device for each training, {at_once} at a time")
        else:
            same.append(name)
    if same:
        console.print(f"The same memory is required by: {', '.join(same)}.", highlight=False)
    large = {one.name for one in every if limit is not None and one.memory.total > limit}
    choice = (
        () if command.suite == "qk" else [arm for arm in command.optimizers if arm not in large]
    )
    for one in every:
        check(one, limit, choice=choice, shared=False)


def apart(command: Command) -> bool:
    """Returns whether each arm trains on its own device; otherwise all devices share each arm."""
    return jax.default_backend() == "cpu" and command.mesh == Mesh() and jax.process_count() == 1


def _where(command: Command, at_once: int) -> str | None:
    return f"one device for each optimizer, {at_once} at a time" if apart(command) else None


def _architecture(command: Command, small: Base) -> Architecture:
    """Returns the architecture of --preset or --model, or else of the small model."""
    if command.preset:
        return PRESETS[command.preset]
    if command.model is not None:
        return config_json.read(Path(command.model).expanduser() / CONFIG)
    return base.architecture_of(small, small.vocabulary)


def case_of(
    config: Training, arm: ArmName, mesh: jax.sharding.Mesh, architecture: Architecture
) -> Case:
    """Returns the case of a training, whose devices need not be present."""
    return case(Trainer(config, arm, architecture, mesh))


def case(trainer: Trainer) -> Case:
    """Returns the case of a trainer."""
    config, a, arm = trainer.config, trainer.architecture, trainer.name
    optimizer = config.optimizer
    savings = {
        "use --remat": not config.remat,
        "use --dtype bfloat16": config.dtype == "float32",
        "use --optimizer.ns-dtype bfloat16": arm != "adamw" and optimizer.ns_dtype == "float32",
    }
    params = trainer.abstract.params

    def updates():
        yield trainer.arm.build(optimizer.learning_rate), params, trainer.specs

    # A token is multiplied with all but gains and, unless it is the head, the embedding.
    def multiplied(tree: Params) -> int:
        return sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if path[-1].key in _MATRICES or (a.tied and path[0].key == "embedding")
        )

    frozen = trainer.abstract.frozen
    products = 3 * multiplied(params) + 2 * multiplied(frozen)  # these have no gradient
    attention = 2 * a.layers * a.heads * a.head_dim * config.context
    return Case(
        config=config,
        name=arm,
        trainer=trainer,
        again=functools.partial(case_of, architecture=a),
        muon=None if arm == "adamw" else optimizer,
        routing=None if arm == "adamw" else arms.routing(arm, optimizer, config.lora, a),
        labels=trainer.arm.labels,
        heads=(a.heads, a.head_dim, a.head_dim),
        flops=(2 * products + 3 * attention) * config.tokens_per_step,
        frozen=frozen,
        arithmetic=f"{config.dtype}, {'remat' if config.remat else 'no remat'}",
        passes=_passes(trainer),
        savings=[words for words, helps in savings.items() if helps],
        optimizers=tuple(arms.ARMS),
        updates=updates,
    )


def _passes(trainer: Trainer) -> dict[str, int]:
    config, a, mesh = trainer.config, trainer.architecture, trainer.mesh
    params = on_device(trainer.abstract.params)
    tensor = mesh.shape["tensor"]
    tokens = config.microbatch * config.context
    tokens //= math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    width = 2 if config.dtype == "bfloat16" else 4
    found = {}
    if config.accumulate > 1:
        found["gradient of a microbatch, float32"] = params
    if config.dtype == "bfloat16":
        found["params, bfloat16"] = params // 2
    # Of a token in a layer: norms and sums, queries, keys, values and their mix, and SwiGLU; and
    # as much again of gradients.
    inside = 4 * a.hidden + (3 * a.heads + 3 * a.kv_heads) * a.head_dim // tensor
    inside += 3 * a.ffn // tensor
    layer = 2 * inside * tokens * width
    inputs = (a.layers + 1) * a.hidden * tokens * width
    platform = mesh.abstract_mesh.abstract_device.platform
    if config.remat and platform != "cpu":
        inputs += a.layers * a.heads * (a.head_dim * width + 4) * tokens // tensor
    at_once = layer if config.remat else a.layers * layer // 2
    found[f"activations of {tokens:,} tokens"] = inputs + at_once
    chunk = vocabulary.loss_tokens(tokens, a.vocabulary // tensor, platform)
    head = a.hidden * a.vocabulary // tensor
    found[f"logits of {chunk:,} tokens, the head and their gradients"] = 4 * (
        2 * chunk * a.vocabulary // tensor + 2 * head
    )
    return found
