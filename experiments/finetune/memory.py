"""What a step takes of a device's memory, told before anything is allocated, and whether it fits.

Params, gradient and optimizer state are exact, from shapes and shardings. What a step has beside
them is an estimate; once a step is compiled, the compiler knows it.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import muon_jax
from experiments.figures import LABELS
from experiments.finetune import arms
from experiments.finetune.config import ArmName
from experiments.finetune.step import Trainer
from experiments.language import sharding, vocabulary
from experiments.language.mesh import mesh_text
from experiments.language.sharding import on_device
from experiments.pages import readable

_SUMMAND = "gradient of a microbatch, float32"


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
        backward[_SUMMAND] = on_device(state.params)
    if config.dtype == "bfloat16":
        backward["params, bfloat16"] = on_device(state.params) // 2
    # Of a token in a layer: norms and sums, queries, keys, values and their mix, and SwiGLU; and
    # as much again of gradients.
    inside = 4 * a.hidden + (3 * a.heads + 3 * a.kv_heads) * a.head_dim // tensor
    inside += 3 * a.ffn // tensor
    layer = 2 * inside * tokens * width
    inputs = (a.layers + 1) * a.hidden * tokens * width
    at_once = layer if config.remat else a.layers * layer // 2
    backward[f"activations of {tokens:,} tokens"] = inputs + at_once
    chunk = min(tokens, vocabulary.LOSS_TOKENS)
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
        "Newton-Schulz": found.total("working_bytes"),
        "updates of the matrices, float32": on_device(matrices),
    }


def _replanned(trainer: Trainer, found: Plan, accumulate: int) -> int:
    """Bytes with another number of microbatches."""
    part = next(part for part in found.backward if part.startswith("activations"))
    kept = sum(v for p, v in found.backward.items() if p not in (part, _SUMMAND))
    kept += found.backward[part] * trainer.config.accumulate // accumulate
    kept += found.held["gradient, float32"] if accumulate > 1 else 0
    return sum(found.held.values()) + max(kept, sum(found.update.values()))


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


def show(trainers: Mapping[ArmName, Trainer], limit: int, console: Console) -> None:
    """Prints the plan of each arm, beside what a device has."""
    plans = {name: plan(trainer) for name, trainer in trainers.items()}
    first = next(iter(trainers.values()))
    config, a = first.config, first.architecture
    console.print(
        f"{a.parameters:,} params on {mesh_text(first.mesh)}\n{config.microbatch} windows of "
        f"{config.context:,} tokens a microbatch, {config.accumulate} of these a step, "
        f"{config.dtype}, {'' if config.remat else 'no '}remat; memory of a device:",
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


def check(trainer: Trainer, limit: int, needed: int | None = None) -> None:
    """Refuses what does not fit.

    Args:
        trainer: of the training.
        limit: bytes that a device has.
        needed: bytes, if the compiler told them; else those of the plan.

    Raises:
        TooLarge: it does not fit.
    """
    found = plan(trainer)
    total = found.total if needed is None else needed
    if total <= limit:
        return
    held = sum(found.held.values())
    config, mesh = trainer.config, trainer.mesh
    remedies = []
    if held > limit:
        state = found.held["optimizer state, float32"]
        remedies.append(
            f"Params, gradient and optimizer state alone are {readable(held)}, so no shorter "
            "context helps"
        )
        if trainer.name == "adamw":
            saved = readable(held - state // 2)
            remedies.append(f"the Muon arms hold about {saved}")
    else:
        if config.accumulate > 1 and _replanned(trainer, found, 1) <= limit:
            remedies.append("take --accumulate 1, since a sum of gradients needs a second one")
        elif _replanned(trainer, found, config.batch) <= limit:
            remedies.append(f"raise --accumulate above {config.accumulate}")
        elif config.batch > 1:
            remedies.append(f"lower --batch {config.batch}")
        remedies.append(f"shorten --context {config.context}")
        if not config.remat:
            remedies.append("take --remat")
        if config.dtype == "float32":
            remedies.append("take --dtype bfloat16")
        if trainer.name != "adamw" and config.optimizer.ns_dtype == "float32":
            remedies.append("take --optimizer.ns-dtype bfloat16")
    more = mesh.size * math.ceil(total / limit)
    remedies.append(f"share it among {more} devices or more with --mesh.fsdp {more}")
    remedies.append("or take a smaller model")
    if trainer.mesh.abstract_mesh.abstract_device.platform == "gpu":
        remedies.append("JAX takes 3/4 of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more")
    told = "The compiled step" if needed is not None else "By the plan a step"
    raise TooLarge(
        f"{told} of {trainer.name} needs {readable(total)} of a device that has "
        f"{readable(limit)}. {'; '.join(remedies)}."
    )
