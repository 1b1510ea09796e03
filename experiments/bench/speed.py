"""Times the updates of several implementations on one device, in turns, to compare them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import muon_jax
from experiments.bench.arms import RATE, matrix_dimensions, random_like, update_step
from experiments.bench.cases import (
    NS_STEPS,
    OPTAX,
    is_shape,
    layer,
    separate,
    stacked,
    standard_flops,
)
from experiments.report.figures import figure_style, new_figure, optimizer_color
from experiments.report.page import Column, Table
from experiments.timing import repeated, spread, take_turns

Row = dict[str, Any]

# The sides of square products that reach the machine's full rate.
GEMM_SIDES = {"cpu": 2048, "gpu": 8192}

TORCH = "torch.optim"


class Tree(NamedTuple):
    """A tree of float32 kernels to update, as shapes `(..., fan_in, fan_out)`."""

    name: str
    shapes: Any
    arms: tuple[str, ...]


class Timed(NamedTuple):
    """An update, as a function that waits for its end, and the dtype of its matrix products."""

    update: Callable[[], None]
    dtype: str


def trees(backend: str) -> list[Tree]:
    """Returns the trees: two layers of GPT-2 on a CPU; GPT-2 and a billion parameters on a GPU."""
    small, large = layer(4, 768, 3072), layer(4, 2048, 8192)
    mixed = ("muon_jax float32", "muon_jax bfloat16", OPTAX)
    if backend == "cpu":
        return [
            Tree("GPT-2 small, 2 layers, separate", separate(small, 2), (*mixed, TORCH)),
            Tree("GPT-2 small, 2 layers, stacked", stacked(small, 2), mixed),
        ]
    low = ("muon_jax bfloat16", OPTAX, f"{OPTAX} bfloat16")
    compiled = f"{TORCH} compiled"
    return [
        Tree("124 M: 12 layers of 768, separate", separate(small, 12), (*low, TORCH, compiled)),
        Tree("124 M: 12 layers of 768, stacked", stacked(small, 12), low),
        Tree("1 B: 20 layers of 2048, stacked", stacked(large, 20), (*low, compiled)),
    ]


def jax_update(params: Any, tx: optax.GradientTransformation) -> Callable[[], None]:
    """Returns a function that updates a tree of arrays, with the same gradients in each call."""
    grads = random_like(params, seed=1)
    step = jax.jit(update_step(tx), donate_argnums=(1, 2))
    params = random_like(params, seed=0)

    def update(held: Any) -> Any:
        params, state = held
        return step(grads, state, params)

    return repeated(update, (params, tx.init(params)), 1)


def torch_update(params: Any, backend: str, compiled: bool) -> Callable[[], None]:
    """Returns an update by `torch.optim.Muon`, which has no stacks: they become single matrices.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: PyTorch finds no GPU although JAX has one.
    """
    import torch

    if backend != "cpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU, although JAX does. Install PyTorch with CUDA.")
    device = "cpu" if backend == "cpu" else "cuda"
    leaves = []
    for leaf in jax.tree.leaves(params):
        for _ in range(leaf.size // (leaf.shape[-2] * leaf.shape[-1])):
            parameter = torch.nn.Parameter(torch.randn(leaf.shape[-2:], device=device))
            parameter.grad = torch.randn_like(parameter)
            leaves.append(parameter)
    optimizer = torch.optim.Muon(leaves, lr=RATE)
    step = torch.compile(optimizer.step) if compiled else optimizer.step

    def update() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return update


def timed(tree: Tree, arm: str, backend: str) -> Timed:
    """Returns an implementation's update of a tree."""
    dtype = jnp.bfloat16 if arm == f"{OPTAX} bfloat16" else jnp.float32
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        tree.shapes,
        is_leaf=is_shape,
    )
    if arm.startswith("muon_jax"):
        ns_dtype = arm.split()[1]
        return Timed(jax_update(params, muon_jax.muon(RATE, ns_dtype=ns_dtype)), ns_dtype)
    if arm.startswith(OPTAX):
        dimensions = matrix_dimensions(params)
        tx = optax.contrib.muon(RATE, muon_weight_dimension_numbers=dimensions)
        return Timed(jax_update(params, tx), dtype.dtype.name)
    return Timed(torch_update(params, backend, arm.endswith("compiled")), "bfloat16")


def gemm(dtype: str, size: int) -> Callable[[], None]:
    """Returns a function that multiplies square matrices, with a float32 accumulator and result."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    x = jax.random.normal(jax.random.key(2), (size, size)).astype(dtype)
    product = jax.jit(
        lambda x: jnp.matmul(x, x, precision=precision, preferred_element_type=jnp.float32)
    )
    return lambda: jax.block_until_ready(product(x))


def compare(tree: Tree, rounds: int, backend: str) -> list[Row]:
    """Times every implementation, and a GEMM of each dtype, in rounds. Returns their rows.

    `standard_ratio` is the time of the update ÷ that of standard Newton-Schulz at the rate of the
    round's GEMM in the same dtype; `share_of_gemm_rate` is its inverse. `times` are seconds, which
    can only be compared within a round.
    """
    size = GEMM_SIDES["cpu" if backend == "cpu" else "gpu"]
    gemms = {dtype: gemm(dtype, size) for dtype in ("float32", "bfloat16")}
    kind = jax.devices()[0].device_kind
    updates: dict[str, Timed] = {}
    rows: dict[str, Row] = {}
    for arm in tree.arms:
        rows[arm] = {"tree": tree.name, "arm": arm, "raises": None, "device": kind}
        try:
            updates[arm] = timed(tree, arm, backend)
            updates[arm].update()  # compiles
        except (ImportError, RuntimeError) as error:
            updates.pop(arm, None)
            rows[arm] |= {"raises": type(error).__name__, "message": str(error).split("\n")[0]}
    calls = {name: one.update for name, one in updates.items()} | gemms
    times = take_turns(calls, rounds)
    flops = standard_flops(tree.shapes)
    for arm, one in updates.items():
        standard = [seconds * flops / (2 * size**3) for seconds in times[one.dtype]]
        rows[arm] |= {"dtype": one.dtype, "times": times[arm], "gemm_times": times[one.dtype]}
        rows[arm]["standard_ratio"] = spread(times[arm], standard)
        rows[arm]["share_of_gemm_rate"] = spread(standard, times[arm])["median"]
        for rival in updates:
            if rival.startswith((OPTAX, TORCH)) and rival != arm:
                rows[arm].setdefault("speedup", {})[rival] = spread(times[rival], times[arm])
    return list(rows.values())


def table(rows: Sequence[Row]) -> Table:
    """Returns a table with speed relative to the other implementations and to the GEMM rate."""
    rivals = dict.fromkeys(r for row in rows for r in row.get("speedup", {}))
    columns: list[Column] = [
        ("tree", "tree", lambda row: row["tree"]),
        ("optimizer", "optimizer", lambda row: row["arm"]),
    ]
    for rival in rivals:
        name = f"× {rival}"
        columns.append((name, name, lambda row, of=rival: _spread(row.get("speedup", {}).get(of))))
    columns.append(("÷ standard", "÷ standard", lambda row: _spread(row.get("standard_ratio"))))
    if any(row["raises"] for row in rows):
        columns.append(("", "raises", _error))
    note = (
        f"× NAME: speed relative to NAME. ÷ standard: time relative to {NS_STEPS} steps of "
        "standard Newton–Schulz at the rate of a GEMM in the same dtype and round."
    )
    title = f"One update on one device ({rows[0]['device']}): median (minimum to maximum)"
    return Table(columns, rows, note, title, note, names=2)


def figure(rows: Sequence[Row]) -> Figure:
    """Draws speed relative to optax, and time relative to standard Newton-Schulz, for each tree."""
    rows = [row for row in rows if not row["raises"]]
    names = list(dict.fromkeys(row["tree"] for row in rows))
    same = {"median": 1.0, "min": 1.0, "max": 1.0}
    columns = {
        f"times as fast as {OPTAX}": lambda row: row.get("speedup", {}).get(OPTAX, same),
        "time ÷ standard Newton–Schulz at the\nGEMM rate of the same dtype": (
            lambda row: row["standard_ratio"]
        ),
    }
    heights = [sum(row["tree"] == name for row in rows) for name in names]
    with figure_style():
        drawing = new_figure(9, 1 + 0.26 * len(rows) + 0.35 * len(names))
        grid = drawing.subplots(
            len(names), 2, sharex="col", sharey="row", squeeze=False, height_ratios=heights
        )
        for panels, name in zip(grid, names, strict=True):
            shown = [row for row in rows if row["tree"] == name]
            for axes, value in zip(panels, columns.values(), strict=True):
                for place, row in enumerate(shown):
                    _draw_bar(axes, place, value(row), optimizer_color(_family(row["arm"])))
                axes.axvline(1, color="#444444", ls=":", lw=1)
                axes.grid(axis="y", visible=False)
            panels[0].set_yticks(range(len(shown)), [row["arm"] for row in shown])
            panels[0].set_title(name, loc="left")
            panels[0].invert_yaxis()
        for axes, label in zip(grid[-1], columns, strict=True):
            axes.set_xlabel(label)
    return drawing


def _draw_bar(axes: Axes, place: int, ratio: dict[str, float], color: str) -> None:
    reach = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
    axes.barh(place, ratio["median"], 0.7, color=color, xerr=reach, ecolor="#333333")
    axes.annotate(f" {ratio['median']:.2f}", (0, place), va="center", fontsize=7, color="white")


def _family(arm: str) -> str:
    return "muon" if arm.startswith("muon_jax") else arm.split(".")[0]


def _spread(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})" if found else "–"


def _error(row: Row) -> str:
    return f"{row['raises']}: {row['message']}" if row["raises"] else ""
