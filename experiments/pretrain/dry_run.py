"""`--dry-run`: what a training is and what a step takes, from shapes alone: nothing is trained."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from rich.text import Text

import muon_jax
from experiments.language import sharding
from experiments.language.mesh import mesh_of_config, mesh_text
from experiments.language.sharding import on_device
from experiments.optimizers import OptimizerName
from experiments.pretrain.config import Training
from experiments.pretrain.costs import step_costs
from experiments.pretrain.step import Trainer
from experiments.report.figures import optimizer_label
from experiments.report.text import flop, readable


def dry_run(config: Training, optimizers: Sequence[OptimizerName], console: Console) -> int:
    """Prints the plan of a training; reads no text and compiles nothing.

    Returns:
        The command's exit code.

    Raises:
        ValueError: an axis that the mesh does not divide, or sizes that no mesh has.
    """
    mesh = mesh_of_config(config.mesh)
    trainers = {name: Trainer(config, name, mesh, config.data.vocabulary) for name in optimizers}
    first = next(iter(trainers.values()))
    params = first.abstract.params

    def show(title: str, *parts: Any) -> None:
        console.print(Text(title, style="bold"))
        for part in parts:
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        console.print()

    show("Params by optimizer", routing(params, optimizers))
    show("Mesh and what it splits", mesh_text(mesh), axes_table(params, mesh))
    show("Parameters", parameters_text(config, params))
    show("Memory per device, without activations (see --compile-only)", memory_table(trainers))
    show("FLOPs per step, over all devices", flops_table(trainers))
    if set(optimizers) != {"adamw"}:
        show("Newton-Schulz of the hidden matrices", str(plan(first)))
    show("Schedule", schedule_text(config, optimizers))
    return 0


def routing(params: Any, optimizers: Sequence[OptimizerName]) -> str:
    """Which param goes to which optimizer."""
    if set(optimizers) == {"adamw"}:
        return "AdamW takes all."
    note = "AdamW itself trains all parameters; the other optimizers train those labelled muon.\n"
    return note * ("adamw" in optimizers) + muon_jax.routing_table(params)


def axes_table(params: Any, mesh: jax.sharding.Mesh) -> Table:
    """The logical axes of each kind of leaf, and the mesh axes that share them out."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("leaves", "logical axes", "split over"):
        table.add_column(heading)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for regex, axes in sharding.LEAVES:
        own = [path for path in paths if re.search(regex, path)]
        paths = [path for path in paths if path not in own]
        if own:
            names = dict.fromkeys("/".join(path.split("/")[-2:]) for path in own)
            over = [
                " × ".join(f"{a} {mesh.shape[a]}" for a in sharding.RULES[axis])
                for axis in axes
                if axis and math.prod(mesh.shape[a] for a in sharding.RULES[axis]) > 1
            ]
            logical = ", ".join(axis or "–" for axis in axes)
            table.add_row(", ".join(names), logical, ", ".join(over) or "whole")
    return table


def parameters_text(config: Training, params: Any) -> str:
    """How many there are, and how many a token passes through."""
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    ends = sum(size for name, size in sizes.items() if re.match("embedding/|head/", name))
    routed = sum(size for name, size in sizes.items() if "/experts/" in name)
    whole = sum(sizes.values())
    idle = routed - routed * config.model.active // config.model.experts
    return (
        f"{whole:,} in total, {whole - ends:,} without embedding and head; "
        f"{whole - ends - idle:,} of these are active per token."
    )


def _table(trainers: dict[OptimizerName, Trainer]) -> Table:
    """A column of names, and one for each optimizer."""
    table = Table("", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in trainers:
        table.add_column(optimizer_label(name), justify="right")
    return table


def memory_table(trainers: dict[OptimizerName, Trainer]) -> Table:
    """Bytes of one device by part, a column for each optimizer."""
    table = _table(trainers)
    columns = [memory(trainer) for trainer in trainers.values()]
    for part in columns[0]:
        table.add_row(part, *(readable(column[part]) for column in columns))
    table.add_row("together", *(readable(sum(column.values())) for column in columns), style="bold")
    return table


def memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of one device by part, without activations."""
    config, state = trainer.config, trainer.abstract
    with jax.set_mesh(trainer.mesh):
        compute = jax.eval_shape(trainer.in_model_dtype, state.params)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        compute,
        trainer.shardings.params,
    )
    windows = jax.ShapeDtypeStruct(
        (config.accumulate, config.batch // config.accumulate, config.context + 1),
        jnp.int32,
        sharding=trainer.windows,
    )
    copy = {f"params, {config.model.dtype}": on_device(placed)}
    return {
        "params, float32": on_device(state.params),
        "optimizer state": on_device(state.opt_state),
        "gradient, float32": on_device(state.params),
        **(copy if config.model.dtype != "float32" else {}),
        "batch": on_device(windows),
    }


def flops_table(trainers: dict[OptimizerName, Trainer]) -> Table:
    """FLOPs of a step, of the model and of Newton-Schulz, a column for each optimizer."""
    table = _table(trainers)
    found = [
        step_costs(trainer.config, name, trainer.abstract.params)
        for name, trainer in trainers.items()
    ]
    table.add_row("model", *(flop(costs.model_flops) for costs in found))
    table.add_row("Newton-Schulz", *(flop(costs.newton_schulz_flops or None) for costs in found))
    return table


def plan(trainer: Trainer) -> muon_jax.Plan:
    """What Newton-Schulz takes; its model has the FLOPs of attention too."""
    config, params = trainer.config, trainer.abstract.params
    costs = step_costs(config, trainer.optimizer, params)
    return muon_jax.plan(
        params,
        mesh=trainer.mesh,
        shardings=trainer.specs,
        tokens_per_step=costs.tokens,
        active_params=round(costs.model_flops / (6 * costs.tokens)),
        ns_coeffs=config.muon.ns_coeffs,
        ns_dtype=config.muon.ns_dtype,
    )


def schedule_text(config: Training, optimizers: Sequence[OptimizerName]) -> str:
    """Rates, their course, and the tokens in all."""
    rates = ", ".join(f"{optimizer_label(name)} {config.rate(name):g}" for name in optimizers)
    warmup = f"warm-up over {_many(config.warmup, 'step')}"
    course = f"{warmup}, then {config.decay} to {config.final_lr_fraction:g}"
    if config.cooldown:
        course += f", then linearly to 0 in the last {_many(config.cooldown, 'step')}"
    return (
        f"Learning rates {rates}; of the parameters that the others leave to AdamW, "
        f"{config.adamw.learning_rate:g}.\n"
        f"Schedule: {course}.\n"
        f"{config.steps:,} steps of {config.batch:,} sequences of {config.context:,} tokens, in "
        f"{_many(config.accumulate, 'microbatch')}: {config.tokens_per_step:,} tokens per step, "
        f"{config.steps * config.tokens_per_step:,} in total."
    )


def _many(count: int, name: str) -> str:
    plural = name + ("es" if name.endswith("ch") else "s")
    return f"{count:,} {name if count == 1 else plural}"
