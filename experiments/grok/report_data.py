"""The data of a grokking report: the files of a run, its cells by arm, and their costs."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments import sweep
from experiments.grok import grid
from experiments.grok.config import Cell, Panel
from experiments.report.names import optimizer_label
from experiments.report.text import number, plural

BASELINE = "adamw"
# A training groks strictly if its grokking epoch is at least this multiple of its memorised epoch.
STRICT = 2
FEW_OPTIMIZERS = 6  # with more, panels of curves and sentences are illegible
SOON = 5  # epochs; a training that generalises this soon after memorising shows no grokking

Row = dict[str, Any]


class Median(NamedTuple):
    """A median. With `at_least`, censored cells leave only a lower bound of it."""

    value: float
    at_least: bool = False

    def text(self, form: Callable[[float], str] = number) -> str:
        """Returns the median as text, such as "> 200" if it is a lower bound."""
        return f"> {form(self.value)}" if self.at_least else form(self.value)


# The cost of an epoch of a cell, by unit. The cost of a cell is that times its sustained grokking
# epoch, or times its budget if it is censored.
UNITS: dict[str, Callable[[Row], float]] = {
    "epochs": lambda row: 1.0,
    "tokens": lambda row: row["tokens_per_epoch"],
    "steps": lambda row: row["steps_per_epoch"],
    "FLOP": lambda row: row["steps_per_epoch"] * row["step_flops"],
    "seconds": lambda row: row["steps_per_epoch"] / row["steps_per_second"],
}


def value(row: Row, what: str) -> float | None:
    """Returns a cell's delay, its cost to grok in one of `UNITS`, or a field; None if missing."""
    if what in UNITS:
        return None if row["censored"] else row["grok_epoch_sustained"] * UNITS[what](row)
    if what == "delay":  # from memorising to sustained grokking
        return None if row["censored"] else row["grok_epoch_sustained"] - row["memorized_epoch"]
    return row[what]


def bound(row: Row, what: str, budget: int) -> float:
    """Returns a lower bound for a missing value of a cell. For epochs it is the budget."""
    if what in UNITS:
        return budget * UNITS[what](row)
    return budget - (row["memorized_epoch"] or budget) if what == "delay" else budget


class Arm(NamedTuple):
    """The cells of one optimizer on one panel."""

    panel: Panel
    optimizer: str
    cells: Sequence[Row]
    budget: int

    @classmethod
    def of(cls, run: "Run", cells: Sequence[Row]) -> "Arm":
        """Returns an arm of any cells of one optimizer, from one or several panels."""
        return cls(Panel("", ""), cells[0]["optimizer"], cells, run.budget)

    @property
    def label(self) -> str:
        return optimizer_label(self.optimizer)

    @property
    def n(self) -> int:
        return len(self.cells)

    @property
    def censored(self) -> int:
        return sum(row["censored"] for row in self.cells)

    @property
    def grokked(self) -> int:
        return self.n - self.censored

    @property
    def strict(self) -> int:
        """The number of cells that grokked strictly, not before twice the memorised epoch."""
        cells = [row for row in self.cells if not row["censored"]]
        return sum(r["grok_epoch_sustained"] >= STRICT * r["memorized_epoch"] for r in cells)

    @property
    def soon(self) -> int:
        """The number of cells that grokked within a few epochs of memorising."""
        delays = (value(row, "delay") for row in self.cells)
        return sum(delay is not None and delay <= SOON for delay in delays)

    @property
    def collapsed(self) -> int:
        return sum(row["collapse_epoch"] is not None for row in self.cells)

    @property
    def below_after_grok(self) -> float | None:
        """The fraction of evaluations below 95 % after grokking, or None if there are none."""
        later, below = (
            sum(row.get(key, 0) for row in self.cells)
            for key in ("evaluations_after_grok", "below_after_grok")
        )
        return below / later if later else None

    def median(self, what: str = "grok_epoch_sustained") -> Median:
        """Returns the median of a value over the cells. A missing value exceeds its bound."""
        return censored_median(
            [value(row, what) for row in self.cells],
            [bound(row, what, self.budget) for row in self.cells],
        )

    @property
    def steps_per_second(self) -> Median:
        speeds = [row["steps_per_second"] for row in self.cells if row["steps_per_second"]]
        return censored_median(speeds, speeds)


@dataclass(frozen=True)
class Run:
    """The contents of a run: `rows` of its finished cells, and `traces` of their epochs.

    Both are in the order of the settings. Stored results have no traces.
    """

    config: dict[str, Any]
    version: str
    machine: dict[str, Any]
    total: int
    rows: list[Row]
    traces: dict[Cell, list[Row]]

    @property
    def budget(self) -> int:
        return int(self.config["epochs"])

    @property
    def cells(self) -> list[Cell]:
        return [Cell.of(row) for row in self.rows]

    @property
    def is_sweep(self) -> bool:
        return any(cell.point for cell in self.cells)

    def optimizers(self) -> list[str]:
        """Returns the optimizers with a finished cell, in the order of the settings."""
        names = {cell.optimizer for cell in self.cells}
        return sorted(names, key=lambda name: _place(self.config["optimizers"], name))

    def panels(self) -> list[Panel]:
        """Returns the panels with a finished cell, in the order of the settings."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    def of(self, panel: Panel | None, optimizer: str) -> list[Row]:
        """Returns the finished cells of an optimizer, on a panel or on all."""
        own = [row for row in self.rows if row["optimizer"] == optimizer]
        return own if panel is None else [row for row in own if Cell.of(row).panel == panel]

    def pooled(self) -> list[Arm]:
        """Returns one arm with all cells for each optimizer."""
        return [Arm.of(self, self.of(None, name)) for name in self.optimizers()]


def load_run(folder: Path) -> Run:
    """Reads the files of a finished or partly finished run, or of stored results.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file has the wrong content; the message names the file.
    """
    config, summary, rows, histories, _ = sweep.load_run(folder)
    rows = rows or summary["cells"]
    axes = [grid.axis(text) for text in config["grid"]]
    points = (point for name in config["optimizers"] for point in grid.points(axes, name))
    orders = {
        "task": config["tasks"],
        "softmax": config["softmax"],
        "point": list(dict.fromkeys(["", *points])),
        "optimizer": config["optimizers"],
    }

    def rank(place: int) -> list:
        row = rows[place]
        return [*(_place(order, row[field]) for field, order in orders.items()), row["seed"]]

    places = sorted(range(len(rows)), key=rank)
    return Run(
        config=config,
        version=summary["version"],
        machine=summary["machine"],
        total=summary["cells_total"],
        rows=[rows[place] for place in places],
        traces={Cell.of(rows[place]): histories[place] for place in places if histories},
    )


def _place(order: Sequence[str], name: str) -> tuple[int, str]:
    """Returns a sort key for this order of names. Unknown names are last and sorted by name."""
    return (order.index(name) if name in order else len(order)), name


def censored_median(values: Iterable[float | None], bounds: Iterable[float]) -> Median:
    """Returns the median of values of which some are known only to exceed a bound.

    A missing value ranks as infinite. If the median is then finite, it is exact. Otherwise a lower
    bound is returned: the median with each missing value replaced by its bound.

    Args:
        values: The values, with None for missing ones.
        bounds: The bound that each value exceeds if it is missing.
    """
    values = list(values)
    if not values:
        return Median(math.nan)
    exact = statistics.median(math.inf if v is None else v for v in values)
    if math.isfinite(exact):
        return Median(exact)
    pairs = zip(values, bounds, strict=True)
    return Median(statistics.median(b if v is None else v for v, b in pairs), at_least=True)


def aggregate(rows: Sequence[Row], budget: int) -> list[Arm]:
    """Groups cells by panel and optimizer, in the order of their first appearance."""
    groups: dict[tuple[Panel, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((Cell.of(row).panel, row["optimizer"]), []).append(row)
    return [Arm(*key, cells, budget) for key, cells in groups.items()]


# --- The cost of grokking ----------------------------------------------------------------------

# The FLOPs of these are unknown: XLA omits decompositions and counts a loop's body only once.
UNCOUNTED = frozenset((
    "polar", "low_rank", "low_rank_subspace", "low_rank_whole", "dion", "splus", "splus_adamw",
    "soap", "soap_muon", "optax_muon",
))  # fmt: skip


def known(optimizer: str, unit: str) -> bool:
    """Returns whether an optimizer's cost is known in a unit."""
    return unit != "FLOP" or optimizer not in UNCOUNTED


def apart(values: Collection[float]) -> bool:
    """Returns whether values differ by over 1 %. XLA's constant folding changes FLOPs by 0.04 %."""
    return max(values, default=0) > 1.01 * min(values, default=0)


def swept(run: Run) -> dict[str, list[str]]:
    """Returns the settings that are swept for each optimizer: those with several values."""
    points = [(cell.optimizer, grid.values(cell.point)) for cell in run.cells]
    pairs = {pair for _, point in points for pair in point.items()}
    several = {s for s, count in Counter(s for s, _ in pairs).items() if count > 1}
    return {
        name: [
            *dict.fromkeys(s for of, point in points if of == name for s in point if s in several)
        ]
        for name in run.optimizers()
    }


def plain(setting: str) -> str:
    """Returns the display name of a setting: "learning rate" for "muon.learning-rate"."""
    return setting.split(".")[-1].replace("-", " ").replace("_", " ")


def numeric(values: Iterable[float | str]) -> bool:
    """Returns whether all values of a setting are numbers."""
    return not any(isinstance(value, str) for value in values)


def ordered(values: Iterable[float | str]) -> list[float | str]:
    """Returns the different values of a setting: numbers sorted, words in their given order.

    Example:
        >>> ordered([64, 32, 64]), ordered(["spectral", "mup", "spectral"])
        ([32, 64], ['spectral', 'mup'])
    """
    found = list(dict.fromkeys(values))
    return sorted(found) if numeric(found) else found


def cost(run: Run, row: Row, unit: str) -> float:
    """Returns the cost of a cell up to its sustained grokking epoch, or up to its budget."""
    return value(row, unit) or bound(row, unit, run.budget)


def counts(run: Run) -> str:
    """Returns a sentence on the number of cells and on the censored ones of each optimizer."""
    seeds = plural(len({row["seed"] for row in run.rows}), "seed")
    cells = f"{len(run.rows)} trainings, {seeds} per setting"
    whose = []
    for name in run.optimizers():
        own = [row["censored"] for row in run.of(None, name)]
        whose += [f"{optimizer_label(name)} {sum(own)} of {len(own)}"] if any(own) else []
    if not whose:
        return f"All of {cells}, grokked within {run.budget} epochs."
    censored = sum(row["censored"] for row in run.rows)
    return f"{cells}; {censored} censored at {run.budget} epochs: {'; '.join(whose)}."


def uncounted(run: Run) -> str:
    """Returns a sentence on optimizers whose FLOPs are unknown, or "" if all are known."""
    names = "; ".join(optimizer_label(n) for n in run.optimizers() if not known(n, "FLOP"))
    why = "XLA's count omits decompositions and the repetitions of loops"
    return f"FLOPs of {names} are unknown (–): {why}." if names else ""
