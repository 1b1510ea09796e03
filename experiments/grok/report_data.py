"""The data of a grokking report: the files of a run, its cells by arm, and their costs."""

import contextlib
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments import sealed
from experiments.commands import print_warning
from experiments.grok import grid
from experiments.grok.config import Cell, Panel
from experiments.json_files import loads, read_json
from experiments.report.names import optimizer_label
from experiments.report.text import number, plural

BASELINE = "adamw"
# A training groks strictly if its grokking epoch is at least this multiple of its memorised epoch.
STRICT = 2
FEW_OPTIMIZERS = 6  # with more, panels of curves and sentences are illegible
SOON = 5  # epochs; a training that generalises this soon after memorising shows no grokking
CONFIG_KEYS = ("tasks", "softmax", "optimizers", "epochs", "grid")
EPOCH_KEYS = (*Cell._fields, "epoch", "train_accuracy", "validation_accuracy")
ROW_KEYS = (
    *Cell._fields, "memorized_epoch", "first_crossing_epoch", "grok_epoch",
    "grok_epoch_sustained", "grok_epoch_near_best", "collapse_epoch", "delay", "censored",
    "diverged", "epochs_run", "seconds", "steps_per_second", "steps_per_epoch", "tokens_per_epoch",
    "step_flops", "parameters",
)  # fmt: skip

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


def delay(row: Row) -> float | None:
    """Returns the epochs from memorising to sustained grokking, or None for a censored cell."""
    return None if row["censored"] else row["grok_epoch_sustained"] - row["memorized_epoch"]


def value(row: Row, what: str) -> float | None:
    """Returns a cell's delay, its cost to grok in one of `UNITS`, or a field; None if missing."""
    if what in UNITS:
        return None if row["censored"] else row["grok_epoch_sustained"] * UNITS[what](row)
    return delay(row) if what == "delay" else row[what]


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
        return sum(delay(row) <= SOON for row in self.cells if not row["censored"])

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
    """The contents of a run: `rows` of its finished cells, `traces` of epochs of started cells."""

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
        """The finished and started cells, in the order of the settings."""
        return sorted({*map(Cell.of, self.rows), *self.traces}, key=_rank(self.config))

    @property
    def is_sweep(self) -> bool:
        return any(cell.point for cell in self.cells)

    def optimizers(self) -> list[str]:
        """Returns the optimizers with a finished or started cell, in the order of the settings."""
        names = {cell.optimizer for cell in self.cells}
        return sorted(names, key=_place(self.config["optimizers"]))

    def panels(self) -> list[Panel]:
        """Returns the panels with a finished or started cell, in the order of the settings."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    def of(self, panel: Panel | None, optimizer: str) -> list[Row]:
        """Returns the finished cells of an optimizer, on a panel or on all."""
        own = [row for row in self.rows if row["optimizer"] == optimizer]
        return own if panel is None else [row for row in own if Cell.of(row).panel == panel]


def _place(names: Sequence[str]) -> Callable[[str], tuple]:
    """Returns a sort key for this order of names. Unknown names are last and sorted by name."""
    return lambda name: (names.index(name), "") if name in names else (len(names), name)


def _rank(config: dict[str, Any]) -> Callable[[Cell], tuple]:
    """Returns a sort key for cells: the order of the settings, and of the points of the grid."""
    tasks, softmax, optimizers = (_place(config[key]) for key in ("tasks", "softmax", "optimizers"))
    axes = [grid.axis(text) for text in config["grid"]]
    names = dict.fromkeys(config["optimizers"])
    points = dict.fromkeys(["", *(point for name in names for point in grid.points(axes, name))])
    point = _place(list(points))

    def rank(cell: Cell) -> tuple:
        where = tasks(cell.task), softmax(cell.softmax), point(cell.point)
        return *where, optimizers(cell.optimizer), cell.seed

    return rank


def _whole(found: Any, where: str, keys: Sequence[str]) -> Row:
    """Checks that a JSON value is an object with these keys. `where` names it in messages."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}.")
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{where}: the record lacks {', '.join(missing)}.")
    return found


def _epochs(path: Path) -> Iterator[Row]:
    """Yields the records of epochs in a log, without a last line that a kill left incomplete."""
    log = sealed.read(path)
    for damage in log.damage:
        print_warning(f"{path} is damaged: {damage}.")
    lines = list(log.text)
    with contextlib.suppress(ValueError):
        loads(log.torn)
        lines.append(log.torn)
    for place, line in enumerate(lines, start=1):
        where = f"{path}, line {place}"
        try:
            found = loads(line) if line.strip() else {"cell": ""}
        except ValueError as error:
            raise ValueError(f"{where}: invalid JSON: {error}.") from None
        if "cell" not in found:  # a line with "cell" is a seal, not a record
            yield _whole(found, where, EPOCH_KEYS)


def load_run(folder: Path) -> Run:
    """Reads the files of a finished or partly finished run.

    Args:
        folder: The run's folder, with config.json, summary.json and metrics.jsonl. Stored results
            have no metrics.jsonl; the result then has no traces.

    Raises:
        FileNotFoundError: The folder, its config.json or its summary.json is missing.
        ValueError: A file has the wrong content; the message names the file and the line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder {folder}. Give the folder of a run.")
    for name in ("config.json", "summary.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}. Give the folder of a run of experiments.grok."
            )
    path = folder / "summary.json"
    config = _whole(read_json(folder / "config.json"), f"{folder / 'config.json'}", CONFIG_KEYS)
    summary = _whole(read_json(path), f"{path}", ("cells_total", "cells"))
    for place, row in enumerate(summary["cells"], start=1):
        _whole(row, f"{path}, cell {place}", ROW_KEYS)
    traces: dict[Cell, list[Row]] = {}
    for row in _epochs(folder / "metrics.jsonl"):
        trace = traces.setdefault(Cell.of(row), [])
        if trace and row["epoch"] <= trace[-1]["epoch"]:
            trace.clear()  # the cell was interrupted and then trained again from its start
        trace.append(row)
    rank = _rank(config)
    return Run(
        config=config,
        version=str(summary.get("version", "unknown")),
        machine=summary.get("machine") or {},
        total=summary["cells_total"],
        rows=sorted(summary["cells"], key=lambda row: rank(Cell.of(row))),
        traces=dict(sorted(traces.items(), key=lambda item: rank(item[0]))),
    )


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


def aggregate(rows: Sequence[Row], budget: int | None = None) -> list[Arm]:
    """Groups finished cells by panel and optimizer, in the order of their first appearance.

    Args:
        rows: The rows of summary.json.
        budget: The epoch budget; by default the most epochs that a cell ran.
    """
    if budget is None:
        budget = max((row["epochs_run"] for row in rows), default=0)
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
    """Returns the settings that are swept for each optimizer."""
    points = [(cell.optimizer, grid.values(cell.point)) for cell in run.cells]
    return {
        name: list(dict.fromkeys(s for owner, point in points if owner == name for s in point))
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
