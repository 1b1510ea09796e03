"""Compiles updates for GPUs and TPUs that need not be present, and compares them with a floor.

The programs never run. FLOPs, kernels, bytes and the TPU compiler's cycles are read from the
compiled programs; milliseconds are estimates by `experiments.roofline`.
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from rich.text import Text

from experiments.bench.arms import ARMS, COLORS
from experiments.bench.cases import (
    EXCHANGED,
    FLOOR,
    OPTAX,
    OURS,
    TOLD,
    Case,
    layer,
    least_flops,
    make_mesh,
    on_mesh,
    separate,
    stacked,
)
from experiments.bench.sharding import compile_step
from experiments.compiled import Kernel, measure
from experiments.report.figures import figure_style, new_figure, plain_log_axis
from experiments.report.text import flop, readable
from experiments.roofline import CHIPS, dearest_table, estimate
from experiments.topology import TopologyError, topology_devices

Row = dict[str, Any]

TOPOLOGIES = ("h100:8", "v5e:2x4")

# The library for matrix products: XLA's choice, which is Triton if there is no device, or cuBLAS.
CHOICE, CUBLAS = "XLA's choice", "cuBLAS"
OPTIONS = {CHOICE: {}, CUBLAS: {"xla_gpu_enable_triton_gemm": False}}

_LEAVES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One program to compile: an implementation's update of a tree.

    Attributes:
        case: The tree on its mesh, with float32 or bfloat16 leaves.
        arm: The implementation, or `FLOOR`, which is a lower bound and not a program.
        topology: The topology, such as h100:8.
        leaves: The dtype of the leaves. Products of muon_jax are always in bfloat16, those of the
            others in this dtype.
        products: The library for matrix products, `CHOICE` or `CUBLAS`.
    """

    case: Case
    arm: str
    topology: str
    leaves: str
    products: str = CHOICE

    @property
    def name(self) -> str:
        """The description that the progress bar shows."""
        return f"{self.case.name} · {self.arm}, {self.leaves}, {self.products}"


def pieces(
    topologies: Sequence[str], layers: int | None, width: int | None, hidden: int | None
) -> tuple[list[Piece], list[Row]]:
    """Returns the programs of the table, and a row for each topology without a compiler here.

    Args:
        topologies: The names of topologies, as in `topology_devices`.
        layers, width, hidden: The size of a tree that replaces the default ones, if `width` is
            given.

    Raises:
        TopologyError: No topology can be compiled for.
    """
    made: list[Piece] = []
    refused: list[Row] = []
    for topology in topologies:
        try:
            devices = topology_devices(topology)
        except TopologyError as error:
            refused.append({"topology": topology, "raises": str(error)})
            if len(refused) == len(topologies):
                raise
            continue
        gpu = devices[0].platform != "tpu"
        if width:
            sizes = [(layers or 2, width, hidden or 4 * width)]
        else:
            sizes = [(12, 768, 3072), (4, 2048, 8192)] if gpu else [(2, 768, 3072), (1, 2048, 8192)]
        for size in sizes:
            made += _on_one(topology, devices, *size, gpu=gpu, first=size == sizes[0])
        made += _on_all(topology, devices, *(sizes[0] if width else (8, 768, 3072)))
    return made, refused


def _on_one(
    topology: str, devices: Any, layers: int, width: int, hidden: int, gpu: bool, first: bool
) -> list[Piece]:
    mesh = make_mesh(devices, {"device": 1})
    shapes = layer(4, width, hidden)
    trees = {"separate": separate(shapes, layers)}
    if first:
        trees["stacked"] = stacked(shapes, layers)
    made = []
    for form, tree in trees.items():
        name = f"{_many(layers)} of {width} / {hidden}, {form}"
        for leaves, dtype in _LEAVES.items():
            case = on_mesh(name, mesh, tree, (None, None), dtype=dtype)
            for products in (CHOICE, CUBLAS) if gpu and form == "separate" else (CHOICE,):
                made += [Piece(case, arm, topology, leaves, products) for arm in (OURS, OPTAX)]
            made.append(Piece(case, FLOOR, topology, leaves))
    return made


def _on_all(topology: str, devices: Any, layers: int, width: int, hidden: int) -> list[Piece]:
    mesh = make_mesh(devices, {"fsdp": len(devices)})
    shapes = layer(2, width, hidden)
    made = []
    for form, tree in {"stacked": stacked, "separate": separate}.items():
        name = f"{_many(layers)} of {width} / {hidden}, {form}, fsdp {len(devices)}"
        spec = ("fsdp", None)
        case = on_mesh(name, mesh, tree(shapes, layers), spec, dtype=jnp.bfloat16)
        arms = (OURS, OPTAX, EXCHANGED, FLOOR)
        made += [Piece(case, arm, topology, "bfloat16") for arm in arms]
    return made


def _many(layers: int) -> str:
    return f"{layers} layer" + "s" * (layers != 1)


def cost(piece: Piece) -> Row:
    """Compiles a program and returns its row. If that fails, the row holds the error.

    `compile_seconds` is CPU time of this process, which does not depend on other processes.
    """
    case = piece.case
    device_kind = case.mesh.devices.flat[0].device_kind
    row: Row = {"topology": piece.topology, "device_kind": device_kind, "case": case.name}
    row |= {"arm": piece.arm, "leaves": piece.leaves, "products": piece.products, "raises": None}
    if piece.arm == FLOOR:
        return row | _floor(case, device_kind)
    if piece.arm == OPTAX:
        row["version"] = importlib.metadata.version("optax")
    began = time.process_time()
    try:
        arm = TOLD if piece.arm == OURS else piece.arm
        tx = ARMS[arm](case, jnp.bfloat16)
        compiled = compile_step(case, tx, OPTIONS[piece.products])
        seconds = time.process_time() - began
        program = measure(compiled)
    except Exception as error:  # an error of an implementation is its result
        message = f"{type(error).__name__}: {error}".split("\n")[0]
        return row | {"raises": message}
    if program.unread:
        return row | {"raises": f"FLOPs of {', '.join(program.unread)} cannot be read."}
    found = estimate(program, device_kind)
    return row | {
        **dataclasses.asdict(found),
        "flops": program.flops,
        "exchanged_bytes": program.exchanged_bytes,
        "collectives": {k: dataclasses.asdict(c) for k, c in program.collectives.items()},
        "temp_bytes": program.temp_bytes,
        "compile_seconds": seconds,
    }


def _floor(case: Case, device_kind: str) -> Row:
    """Returns a lower bound: the time of the fewest known FLOPs or of moving each array once.

    Gradient, momentum and params are read; momentum and params are written.
    """
    leaves = jax.tree.leaves(case.params)
    flops = least_flops([leaf.shape for leaf in leaves]) // case.mesh.size
    held = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )
    seconds = CHIPS[device_kind].floor(flops, 5 * held)
    return {"flops": flops, "hbm_bytes": 5 * held, "seconds": seconds}


def tables(rows: Sequence[Row]) -> Group:
    """Returns the table, and assumptions and most expensive kernels of muon_jax per topology."""
    parts: list[Any] = [table(rows)]
    shown: set[str] = set()
    for row in rows:
        if row["raises"] or row["topology"] in shown or row["arm"] != OURS:
            continue
        shown.add(row["topology"])
        parts.append(Text(CHIPS[row["device_kind"]].assumptions()))
        dearest = [(Kernel(**kernel), seconds) for kernel, seconds in row["dearest"]]
        parts.append(dearest_table(dearest, f"Most expensive kernels of muon_jax, {row['case']}"))
    return Group(*parts)


def table(rows: Sequence[Row]) -> Table:
    """Returns the table of all rows, with one line for each program."""
    result = Table(
        title="One update on one device, compiled",
        caption="ms: roofline time. Mcycles: estimate of the TPU compiler. compile: CPU time of "
        "compilation ÷ Optax's. muon_jax multiplies in bfloat16, the others in the dtype of the "
        "leaves. floor: the time of the fewest known FLOPs, or of reading gradient, momentum and "
        "parameters and writing the latter two once, whichever is longer.",
    )
    for heading in ("tree", "leaves", "optimizer"):
        result.add_column(heading)
    for heading in ("kernels", "FLOPs", "HBM", "exchanged", "temp", "ms", "Mcycles", "compile"):
        result.add_column(heading, justify="right")
    for row, after in zip(rows, [*rows[1:], {}], strict=True):
        if "case" not in row:
            result.add_row(row["topology"], "", row["raises"], end_section=True)
            continue
        cells = [row["raises"]] if row["raises"] else _cells(row, rows)
        names = f"{row['topology']}: {row['case']}", row["leaves"], label(row)
        result.add_row(*names, *cells, end_section=not _alike(row, after))
    return result


def label(row: Row) -> str:
    """Returns the implementation with the version of its package and cuBLAS, if it was chosen."""
    name = f"{row['arm']} {row['version']}" if "version" in row else row["arm"]
    return f"{name}, cuBLAS" if row["products"] == CUBLAS else name


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    if row["arm"] == FLOOR:
        ms = f"{1e3 * row['seconds']:.3g}"
        return ["–", flop(row["flops"]), readable(row["hbm_bytes"]), "–", "–", ms, "–", "–"]
    rivals = (r for r in rows if r.get("arm") == OPTAX and _alike(r, row))
    rival = next((r for r in rivals if r["products"] == row["products"]), None)
    ratio = "–"
    if rival and not rival["raises"]:
        ratio = f"{row['compile_seconds'] / rival['compile_seconds']:.1f}"
    return [
        f"{row['kernels']:,}",
        flop(row["flops"]),
        readable(row["hbm_bytes"]),
        readable(row["exchanged_bytes"]) if row["exchanged_bytes"] else "–",
        readable(row["temp_bytes"]),
        f"{1e3 * row['seconds']:.3g}",
        f"{row['cycles'] / 1e6:.2f}" if row["cycles"] else "–",
        ratio,
    ]


def _alike(row: Row, other: Row) -> bool:
    """Returns whether both rows have the same tree, topology and dtype."""
    return all(row.get(key) == other.get(key) for key in ("topology", "case", "leaves"))


def figure(rows: Sequence[Row]) -> Figure:
    """Draws the milliseconds of every program as bars."""
    shown = [row for row in rows if not row["raises"]]
    with figure_style():
        drawing = new_figure(9, 1 + 0.24 * len(shown))
        axes = drawing.subplots()
        names = []
        for place, row in enumerate(shown):
            axes.barh(place, 1e3 * row["seconds"], 0.8, color=COLORS[row["arm"]])
            text = f" {1e3 * row['seconds']:.3g}"
            axes.annotate(text, (1e3 * row["seconds"], place), va="center", fontsize=6.5)
            names.append(f"{row['topology']}, {row['case']}, {row['leaves']}: {label(row)}")
        axes.set_yticks(range(len(shown)), names, fontsize=6.5)
        plain_log_axis(axes, "x")
        axes.margins(y=0.01)
        axes.set_xlabel("ms by the roofline")
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
    return drawing
