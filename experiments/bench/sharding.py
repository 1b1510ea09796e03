"""The cost of an optimizer step on each device of a mesh, read from its compiled program."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Group

from experiments.bench.arms import ARMS, COLORS, update_step
from experiments.bench.cases import Case
from experiments.compiled import Kernel, measure
from experiments.report.figures import figure_style, legend_line, new_figure
from experiments.report.page import Column, Table
from experiments.report.text import flop, readable
from experiments.roofline import CHIPS, dearest_table, estimate

Row = dict[str, Any]


def compile_step(
    case: Case, tx: optax.GradientTransformation, options: Mapping[str, Any] | None = None
) -> Any:
    """Compiles a step with donated arrays. Gradients and momentum are sharded like the params.

    Args:
        case: The params and their shardings.
        tx: The optimizer.
        options: XLA's options for this program.
    """
    with jax.set_mesh(case.mesh) if case.explicit else contextlib.nullcontext():
        state = laid_out(case, jax.eval_shape(tx.init, case.params))
        layouts = jax.tree.map(lambda leaf: leaf.sharding, (case.params, state, case.params))
        step = update_step(tx)
        # XLA matches donated arguments to results in order, so new params replace old ones.
        in_order = jax.jit(
            lambda grads, params, state: step(grads, state, params),
            in_shardings=(layouts[0], layouts[2], layouts[1]),
            out_shardings=(layouts[2], layouts[1]),
            donate_argnums=(1, 2),
        )
        lowered = in_order.lower(case.params, case.params, state)
        return lowered.compile(compiler_options=dict(options or {}))


def laid_out(case: Case, state: Any) -> Any:
    """Adds shardings to the state's shapes: those of the params they mirror, or replicated."""
    params = jax.tree_util.tree_flatten_with_path(case.params)[0]
    replicated = NamedSharding(case.mesh, P())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        mirrored = (p.sharding for end, p in params if path[-len(end) :] == end)
        sharding = next(mirrored, replicated) if leaf.ndim else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def cost(case: Case, arm: str, dtype: jax.typing.DTypeLike) -> Row:
    """Compiles an implementation for a case and returns its row. If it fails, the row says so.

    `flops_ratio` is FLOPs per device ÷ its share of standard Newton-Schulz of each matrix once.
    `bytes_ratio` is bytes exchanged per device ÷ bytes of its bfloat16 shard of the params.
    """
    row: Row = {"case": case.name, "arm": arm, "ns_dtype": jnp.dtype(dtype).name, "raises": None}
    row |= {"devices": case.mesh.size, "explicit": case.explicit, "shard_bytes": case.shard_bytes()}
    began = time.perf_counter()
    try:
        program = measure(compile_step(case, ARMS[arm](case, dtype)))
    except Exception as error:  # an error of an implementation is its result
        return row | {"raises": type(error).__name__, "message": str(error).split("\n")[0]}
    device_kind = case.mesh.devices.flat[0].device_kind
    if found := estimate(program, device_kind):
        row |= {
            **dataclasses.asdict(found),
            "device_kind": device_kind,
            "beside": sum(c.beside for c in program.collectives.values()),
        }
    return row | {
        "flops_ratio": program.flops * case.mesh.size / case.standard_flops(),
        "bytes_ratio": program.exchanged_bytes / case.shard_bytes(),
        "collectives": {kind: c.count for kind, c in program.collectives.items()},
        "collectives_in_loops": program.in_loops,
        "flops": program.flops,
        "exchanged_bytes": program.exchanged_bytes,
        "temp_bytes": program.temp_bytes,
        "argument_bytes": program.argument_bytes,
        "unread": list(program.unread),
        "compile_seconds": time.perf_counter() - began,
    }


def _of(form: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: "–" if row["raises"] else form(row)


def _columns(forms: dict[str, Callable[[Row], str]]) -> list[Column]:
    names = {"case": lambda row: row["case"], "optimizer": lambda row: row["arm"]}
    return [(heading, heading, form) for heading, form in (names | forms).items()]


COLUMNS = _columns(
    {
        "FLOPs": _of(lambda row: f"{row['flops_ratio']:.2f}"),
        "bytes": _of(lambda row: f"{row['bytes_ratio']:.2f}"),
        "temp": _of(lambda row: f"{row['temp_bytes'] / row['shard_bytes']:.1f}"),
        "temp MB": _of(lambda row: f"{row['temp_bytes'] / 1e6:.1f}"),
        "collectives": lambda row: f"raises {row['raises']}" if row["raises"] else collectives(row),
    }
)
ON_CHIPS = _columns(
    {
        "kernels": lambda row: f"{row['kernels']:,}",
        "FLOPs": lambda row: flop(row["flops"]),
        "HBM": lambda row: readable(row["hbm_bytes"]),
        "exchanged": lambda row: readable(row["exchanged_bytes"]),
        "overlapped": lambda row: f"{row['beside']:,}",
        "ms": lambda row: f"{1e3 * row['seconds']:.3g}",
        "Mcycles": lambda row: f"{row['cycles'] / 1e6:.2f}" if row["cycles"] else "–",
    }
)
CAPTION = (
    "FLOPs: relative to the device's share of standard Newton–Schulz of each matrix once. bytes "
    "exchanged, and temp (temporary memory): relative to the device's bfloat16 shard of the "
    "parameters."
)


def table(rows: Sequence[Row]) -> Table:
    """Returns the table of all rows, with the implementations of each case together."""
    return Table(COLUMNS, rows, CAPTION, "One step, per device", CAPTION, names=2)


def tables(rows: Sequence[Row]) -> Group:
    """Returns that table and, for a topology, roofline times and the most expensive kernels."""
    parts: list[Any] = [table(rows)]
    timed = [row for row in rows if "kernels" in row]
    if timed:
        note = "ms: all kernels in sequence. overlapped: collectives that run beside kernels."
        note = f"{note}\n{CHIPS[timed[0]['device_kind']].assumptions()}"
        title = "The same step, on each device of the topology"
        parts.append(Table(ON_CHIPS, timed, note, title, note, names=2))
    for row in timed:
        dearest = [(Kernel(**kernel), seconds) for kernel, seconds in row["dearest"]]
        parts.append(dearest_table(dearest, f"Most expensive kernels, {row['case']}, {row['arm']}"))
    return Group(*parts)


def collectives(row: Row) -> str:
    """Returns the collectives as text, such as "3 all-gather, 2 all-to-all (2 in loops)"."""
    counts = ", ".join(f"{count} {kind}" for kind, count in row["collectives"].items())
    inside = row["collectives_in_loops"]
    return (counts or "none") + f" ({inside} in loops)" * bool(inside)


def figure(rows: Sequence[Row]) -> Figure:
    """Draws FLOPs, bytes and temporary memory of every implementation and case as bars."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    present = [arm for arm in COLORS if any(row["arm"] == arm for row in rows)]
    height = 0.8 / len(present)
    panels = {
        "FLOPs ÷ (standard ÷ devices)": lambda row: row["flops_ratio"],
        "bytes exchanged ÷ shard": lambda row: row["bytes_ratio"],
        "temporary memory ÷ shard": lambda row: row["temp_bytes"] / row["shard_bytes"],
    }
    with figure_style():
        drawing = new_figure(11, 1.2 + 0.6 * len(cases))
        grid = drawing.subplots(1, len(panels), sharey=True)
        for axes, (title, value) in zip(grid, panels.items(), strict=True):
            for row in rows:
                place = cases.index(row["case"]) + (present.index(row["arm"]) + 0.5) * height - 0.4
                label = f" raises {row['raises']}" if row["raises"] else f" {value(row):.3g}"
                width = 0 if row["raises"] else value(row)
                axes.barh(place, width, 0.9 * height, color=COLORS[row["arm"]])
                axes.annotate(label, (width, place), va="center", fontsize=6.5)
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
            axes.set_xlim(0, 4 * max([1, *(value(row) for row in rows if not row["raises"])]))
            axes.set_title(title)
            axes.set_yticks(range(len(cases)), cases)
            axes.grid(axis="y", visible=False)
        drawing.axes[0].invert_yaxis()
        handles = [legend_line(arm, COLORS[arm], lw=5) for arm in present]
        drawing.legend(handles=handles, loc="outside lower center", ncols=len(present))
    return drawing
