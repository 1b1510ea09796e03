"""What a step takes of a device's memory, told before anything is allocated, and whether it fits.

Params, gradient and optimizer state are exact, from shapes and shardings. What a step has beside
them is an estimate; once a step is compiled, the compiler knows it.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import muon_jax
from experiments.finetune import arms
from experiments.finetune.config import ArmName
from experiments.finetune.step import Trainer
from experiments.language import sharding, vocabulary
from experiments.language.mesh import Mesh, mesh_of_config, mesh_text
from experiments.language.sharding import on_device
from experiments.report.figures import LABELS
from experiments.report.text import readable


class Plan(NamedTuple):
    """Bytes of one device.

    Attributes:
        held: by part, from step to step, and the gradient.
        backward: by part, what the forward and backward passes have beside that.
        update: by part, what the update has beside it.
    """

    held: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]

    @property
    def total(self) -> int:
        """At most at a time: the passes' own are gone when the update begins."""
        own = max(sum(self.backward.values()), sum(self.update.values()))
        return sum(self.held.values()) + own


class TooLarge(ValueError):
    """A training that the device has no memory for; the message says what to change."""


def plan(trainer: Trainer) -> Plan:
    """Of a training that need not be compiled, nor have its devices."""
    config, a, mesh = trainer.config, trainer.architecture, trainer.mesh
    state = trainer.abstract
    tensor = mesh.shape["tensor"]
    tokens = config.microbatch * config.context
    tokens //= math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    width = 2 if config.dtype == "bfloat16" else 4
    held = {
        "params, float32": on_device(state.params),
        "gradient, float32": on_device(state.params),
        "optimizer state, float32": on_device(state.opt_state),
    }
    backward = {}
    if config.accumulate > 1:
        backward["gradient of a microbatch, float32"] = on_device(state.params)
    if config.dtype == "bfloat16":
        backward["params, bfloat16"] = on_device(state.params) // 2
    # Of a token in a layer: norms and sums, queries, keys, values and their mix, and SwiGLU; and
    # as much again of gradients.
    inside = 4 * a.hidden + (3 * a.heads + 3 * a.kv_heads) * a.head_dim // tensor
    inside += 3 * a.ffn // tensor
    layer = 2 * inside * tokens * width
    inputs = (a.layers + 1) * a.hidden * tokens * width
    platform = trainer.mesh.abstract_mesh.abstract_device.platform
    if config.remat and platform != "cpu":
        inputs += a.layers * a.heads * (a.head_dim * width + 4) * tokens // tensor
    at_once = layer if config.remat else a.layers * layer // 2
    backward[f"activations of {tokens:,} tokens"] = inputs + at_once
    chunk = vocabulary.loss_tokens(tokens, a.vocabulary // tensor, platform)
    head = a.hidden * a.vocabulary // tensor
    backward[f"logits of {chunk:,} tokens, the head and their gradients"] = 4 * (
        2 * chunk * a.vocabulary // tensor + 2 * head
    )
    return Plan(held, backward, _update(trainer))


def _update(trainer: Trainer) -> dict[str, int]:
    if trainer.name == "adamw":
        return {"update": 0}
    settings = trainer.config.optimizer
    found = muon_jax.plan(
        trainer.abstract.params,
        mesh=trainer.mesh,
        shardings=trainer.specs,
        ns_coeffs=settings.ns_coeffs,
        ns_dtype=settings.ns_dtype,
        routing=arms.routing(trainer.name, settings, trainer.architecture),
    )
    leaves = map(jax.tree.leaves, (trainer.abstract.params, trainer.arm.labels))
    matrices = [leaf for leaf, label in zip(*leaves, strict=True) if label == "muon"]
    return {
        "Newton-Schulz": found.peak(),
        "updates of the matrices, float32": on_device(matrices),
    }


def compiled(trainer: Trainer) -> int:
    """Bytes of one device that the compiled step takes, arguments and outputs too."""
    found: Any = trainer.program.memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def device_memory(device: jax.Device, sharing: int = 1) -> int:
    """Bytes that a device lets JAX have; of a CPU the machine's, shared by so many trainings."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing


def show(
    trainers: Mapping[ArmName, Trainer], limit: int, console: Console, where: str | None = None
) -> None:
    """Prints the plan of each arm, beside what a device has.

    Args:
        trainers: of one model and one config, by arm.
        limit: bytes that a device has.
        console: to print on.
        where: which devices train; by default those of the mesh.
    """
    plans = {name: plan(trainer) for name, trainer in trainers.items()}
    first = next(iter(trainers.values()))
    config, a = first.config, first.architecture
    remat = "remat" if config.remat else "no remat"
    console.print(
        f"{a.parameters:,} parameters on {where or mesh_text(first.mesh)}\n"
        f"{config.microbatch} sequences of {config.context:,} tokens per microbatch, "
        f"{config.accumulate} microbatches per step, {config.dtype}, {remat}; memory per device:",
        highlight=False,
    )
    table = Table("", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in plans:
        table.add_column(LABELS.get(name, name), justify="right")

    def add(part: str, values: list[int], style: str = "") -> None:
        table.add_row(part, *(readable(value) if value else "–" for value in values), style=style)

    phases = ("held", ""), ("backward", "in the passes: "), ("update", "in the update: ")
    for phase, prefix in phases:
        parts = dict.fromkeys(part for p in plans.values() for part in getattr(p, phase))
        for part in parts:
            values = [getattr(p, phase).get(part, 0) for p in plans.values()]
            if any(values):
                add(prefix + part, values)
    add("together, at most at a time", [p.total for p in plans.values()], "bold")
    add("the device has", [limit] * len(plans))
    console.print(table)


def check(
    trainer: Trainer,
    limit: int,
    needed: int | None = None,
    choice: Sequence[ArmName] = tuple(arms.ARMS),
    shared: bool = True,
) -> None:
    """Refuses what does not fit.

    Args:
        trainer: of the training.
        limit: bytes that a device has.
        needed: bytes, if the compiler told them; else those of the plan.
        choice: arms that may be advised in its place.
        shared: whether it may be advised to share the training among devices.

    Raises:
        TooLarge: it does not fit.
    """
    found = plan(trainer).total
    total = found if needed is None else needed
    if total <= limit:
        return
    told = "The compiled step" if needed is not None else "By the plan a step"
    # What the compiler takes beyond the plan it takes after a change, too.
    remedies = _remedies(trainer, limit, max(total - found, 0), choice, shared)
    raise TooLarge(
        f"{told} of {trainer.name} requires {readable(total)} of memory, and the device has "
        f"{readable(limit)}. {'; '.join(remedies)}."
    )


def _remedies(
    trainer: Trainer, limit: int, more: int, choice: Sequence[ArmName], shared: bool
) -> list[str]:
    """What to change; a size is named only if the plan of it fits."""
    config, mesh = trainer.config, trainer.mesh

    def fits(arm: ArmName = trainer.name, mesh: Any = mesh, **changes: int) -> bool:
        changed = dataclasses.replace(config, **changes)
        try:
            return plan(Trainer(changed, arm, trainer.architecture, mesh)).total + more <= limit
        except ValueError:  # the mesh does not divide an axis
            return False

    remedies = []
    held = sum(plan(trainer).held.values())
    if held > limit:
        remedies.append(
            f"Parameters, gradient and optimizer state alone take {readable(held)}, so a shorter "
            "context does not help"
        )
    else:
        sizes = _divisors(config.batch)
        accumulate = next((n for n in sizes if n > config.accumulate and fits(accumulate=n)), None)
        batch = next((n for n in sizes[-2::-1] if fits(batch=n, accumulate=1)), None)
        if config.accumulate > 1 and fits(accumulate=1):
            remedies.append("use --accumulate 1, which stores no sum of gradients")
        elif accumulate:
            remedies.append(f"use --accumulate {accumulate}")
        elif batch:
            remedies.append(f"use --batch {batch}")
        remedies.append(f"shorten --context {config.context}")
        if not config.remat:
            remedies.append("use --remat")
        if config.dtype == "float32":
            remedies.append("use --dtype bfloat16")
        if trainer.name != "adamw" and config.optimizer.ns_dtype == "float32":
            remedies.append("use --optimizer.ns-dtype bfloat16")
    if fitting := [arm for arm in choice if arm != trainer.name and fits(arm)]:
        remedies.append(f"use --optimizers {' '.join(fitting)}, which would fit")
    if shared:
        remedies.append(_sharing(trainer, fits))
    remedies.append("use a smaller model")
    if mesh.abstract_mesh.abstract_device.platform == "gpu":
        remedies.append("raise XLA_PYTHON_CLIENT_MEM_FRACTION, by default 0.75 of a GPU's memory")
    return remedies


def _sharing(trainer: Trainer, fits: Callable[..., bool]) -> str:
    """The least --mesh.fsdp that fits, if one does."""
    sizes = dict(trainer.mesh.shape)
    others = trainer.mesh.size // sizes["fsdp"]
    microbatch = trainer.config.microbatch
    for fsdp in _divisors(microbatch):
        if fsdp > sizes["fsdp"] and fits(mesh=mesh_of_config(Mesh(**sizes | {"fsdp": fsdp}))):
            return f"shard it over {fsdp * others} devices with --mesh.fsdp {fsdp}"
    return (
        f"no --mesh.fsdp that divides a microbatch (--batch / --accumulate = {microbatch} "
        "sequences) and the model's axes suffices"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
