"""`--dry-run`: prints the plan of a training, computed from shapes without training."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import muon_jax
from experiments.language import sharding
from experiments.language.mesh import mesh_text
from experiments.language.planning import Case, check
from experiments.report.figures import optimizer_label
from experiments.report.text import flop, readable


def table_of(optimizers: Iterable[str], corner: str = "") -> Table:
    """Returns a table with a column of names and a column for each optimizer."""
    table = Table(corner, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in optimizers:
        table.add_column(optimizer_label(name), justify="right")
    return table


def show_memory(
    cases: Sequence[Case], limit: int | None, console: Console, where: str | None = None
) -> None:
    """Prints the memory that each optimizer needs per device, and the memory available.

    Args:
        cases: Trainings of one model with one config.
        limit: Bytes available on a device; None if unknown.
        console: The console to print to.
        where: A description of the devices. By default, that of the mesh.
    """
    first, config = cases[0], cases[0].config
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (first.params, first.frozen)
    )
    lora = f", of which {trained:,} are trained," if frozen else ""
    console.print(
        f"{trained + frozen:,} parameters{lora} on {where or mesh_text(first.mesh)}\n"
        f"{many(first.microbatch, 'sequence')} of {config.context:,} tokens per microbatch, "
        f"{many(config.accumulate, 'microbatch')} per step, {first.arithmetic}; memory per device:",
        highlight=False,
        soft_wrap=True,
    )
    table = table_of(case.name for case in cases)
    phases = ("held", ""), ("backward", "forward, backward: "), ("update", "optimizer update: ")
    for phase, prefix in phases:
        columns = [getattr(case.memory, phase) for case in cases]
        for part in dict.fromkeys(part for column in columns for part in column):
            sizes = [column.get(part, 0) for column in columns]
            table.add_row(prefix + part, *(readable(size) if size else "–" for size in sizes))
    totals = [readable(case.memory.total) for case in cases]
    table.add_row("peak", *totals, style="bold")
    has = "unknown" if limit is None else readable(limit)
    table.add_row("available", *[has] * len(cases))
    console.print(table, soft_wrap=True)


def dry_run(
    cases: Sequence[Case],
    limit: int | None,
    console: Console,
    where: str | None = None,
    schedule: str | None = None,
) -> None:
    """Prints the plan of a training, without reading its text or compiling its step.

    Args:
        cases, limit, console, where: As for `show_memory`.
        schedule: A description of the learning rates and steps.

    Raises:
        TooLarge: If a training does not fit the device's memory.
    """
    first, names = cases[0], {case.name for case in cases}
    muon = next((case for case in cases if case.muon is not None), None)

    def show(title: str, *parts: Any) -> None:
        console.print(Text(title, style="bold"))
        for part in parts:
            console.print(part, highlight=False, markup=False, soft_wrap=True)
        console.print()

    show("Optimizer of each parameter", _routing(first.params, names))
    show("Sharding of the parameters", _axes_table(first.params, first.mesh))
    show("Parameters", _parameters_text(first))
    console.print(Text("Memory", style="bold"))
    show_memory(cases, limit, console, where)
    console.print()
    flops = table_of(case.name for case in cases)
    flops.add_row("model", *(flop(case.flops) for case in cases))
    products = (case.newton_schulz().total("flops") if case.muon else None for case in cases)
    flops.add_row("Newton-Schulz", *map(flop, products))
    show("FLOPs per step, over all devices", flops)
    if muon is not None:
        config = first.config
        tokens = config.batch * config.context
        active = round(muon.flops / (6 * tokens))  # counts attention's FLOPs as those of parameters
        plan = muon.newton_schulz(
            mesh=muon.mesh,
            shardings=muon.trainer.specs,
            tokens_per_step=tokens,
            active_params=active,
        )
        show("Newton-Schulz of the hidden matrices", str(plan))
    if schedule:
        show("Schedule", schedule)
    for case in cases:
        check(case, limit)


def _routing(params: Any, names: set[str]) -> str:
    """Returns a table of the optimizer of each parameter."""
    if names == {"adamw"}:
        return "AdamW trains all parameters."
    note = "AdamW itself trains all parameters; the other optimizers train those labelled muon.\n"
    return note * ("adamw" in names) + muon_jax.routing_table(params)


def _axes_table(params: Any, mesh: jax.sharding.Mesh) -> Table:
    """Returns a table of each leaf's logical axes, and of the mesh axes that split them."""
    table = Table(
        "leaves", "logical axes", "split over", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    paths = [name for name, _ in sharding.named_leaves(params)]
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
            table.add_row(", ".join(names), logical, ", ".join(over) or "not split")
    return table


def _parameters_text(case: Case) -> str:
    """Returns the number of parameters, in all and active per token, as text."""
    leaves = map(sharding.named_leaves, (case.params, case.frozen))
    sizes = {name: leaf.size for tree in leaves for name, leaf in tree}
    whole = sum(sizes.values())
    inner = whole - sum(n for name, n in sizes.items() if re.match("embedding/|head/", name))
    return (
        f"{whole:,} in total, {inner:,} without embedding and head; "
        f"{inner - case.idle:,} of these are active per token."
    )


def many(count: int, name: str) -> str:
    """Returns a count with its noun in the singular or plural."""
    plural = name + ("es" if name.endswith("ch") else "s")
    return f"{count:,} {name if count == 1 else plural}"
