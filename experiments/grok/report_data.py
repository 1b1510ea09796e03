"""What the report knows of a grokking run: its files, its cells per arm, and what these took."""

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
from experiments.report.figures import optimizer_label
from experiments.report.text import number, plural

BASELINE = "adamw"
# A training groks strictly if it generalises at this many times the epoch at which it memorised.
STRICT = 2
FEW_OPTIMIZERS = 6  # more make a panel of curves, and a sentence, illegible
SOON = 5  # epochs: one that generalises so soon after memorising shows no grokking
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
    """A median; `at_least` says that censored cells leave only a lower bound of it."""

    value: float
    at_least: bool = False

    def text(self, form: Callable[[float], str] = number) -> str:
        """As "> 200" where it is only a lower bound."""
        return f"> {form(self.value)}" if self.at_least else form(self.value)


# What an epoch of a cell takes, in the units of each axis; a cell takes that many times its
# sustained grokking epoch, and a censored one its budget.
UNITS: dict[str, Callable[[Row], float]] = {
    "epochs": lambda row: 1.0,
    "tokens": lambda row: row["tokens_per_epoch"],
    "steps": lambda row: row["steps_per_epoch"],
    "FLOP": lambda row: row["steps_per_epoch"] * row["step_flops"],
    "seconds": lambda row: row["steps_per_epoch"] / row["steps_per_second"],
}


def delay(row: Row) -> float | None:
    """Epochs from memorising to sustained grokking; None of a censored cell."""
    return None if row["censored"] else row["grok_epoch_sustained"] - row["memorized_epoch"]


def value(row: Row, what: str) -> float | None:
    """A cell's delay, what it took to grok in one of `UNITS`, or a field of it; None if missing."""
    if what in UNITS:
        return None if row["censored"] else row["grok_epoch_sustained"] * UNITS[what](row)
    return delay(row) if what == "delay" else row[what]


def bound(row: Row, what: str, budget: int) -> float:
    """What a cell's value exceeds where it is missing; an epoch exceeds the budget."""
    if what in UNITS:
        return budget * UNITS[what](row)
    return budget - (row["memorized_epoch"] or budget) if what == "delay" else budget


class Arm(NamedTuple):
    """What the seeds of one optimizer did on one panel."""

    panel: Panel
    optimizer: str
    cells: Sequence[Row]
    budget: int

    @classmethod
    def of(cls, run: "Run", cells: Sequence[Row]) -> "Arm":
        """Of any cells of one optimizer, whatever their panels; of some there is no panel."""
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
        """Cells that grokked strictly: not before twice the memorised epoch."""
        cells = [row for row in self.cells if not row["censored"]]
        return sum(r["grok_epoch_sustained"] >= STRICT * r["memorized_epoch"] for r in cells)

    @property
    def soon(self) -> int:
        """Cells that grokked within a few epochs of memorising."""
        return sum(delay(row) <= SOON for row in self.cells if not row["censored"])

    @property
    def collapsed(self) -> int:
        return sum(row["collapse_epoch"] is not None for row in self.cells)

    @property
    def below_after_grok(self) -> float | None:
        """Share of the evaluations after grokking that is below 95 %."""
        later, below = (
            sum(row.get(key, 0) for row in self.cells)
            for key in ("evaluations_after_grok", "below_after_grok")
        )
        return below / later if later else None

    def median(self, what: str = "grok_epoch_sustained") -> Median:
        """Over the cells; a missing value exceeds its bound."""
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
    """A run's files; `rows` are its finished cells, `traces` the epochs of every cell begun."""

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
        """Those finished or begun, in the settings' order."""
        return sorted({*map(Cell.of, self.rows), *self.traces}, key=_rank(self.config))

    @property
    def is_sweep(self) -> bool:
        return any(cell.point for cell in self.cells)

    def optimizers(self) -> list[str]:
        """The optimizers with a finished or begun cell, in the settings' order."""
        names = {cell.optimizer for cell in self.cells}
        return sorted(names, key=_place(self.config["optimizers"]))

    def panels(self) -> list[Panel]:
        """The panels with a finished or begun cell, in the settings' order."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    def of(self, panel: Panel | None, optimizer: str) -> list[Row]:
        """An optimizer's finished cells, on a panel or on all."""
        own = [row for row in self.rows if row["optimizer"] == optimizer]
        return own if panel is None else [row for row in own if Cell.of(row).panel == panel]


def _place(names: Sequence[str]) -> Callable[[str], tuple]:
    """A sort key that puts names in order, unknown ones last and by the alphabet."""
    return lambda name: (names.index(name), "") if name in names else (len(names), name)


def _rank(config: dict[str, Any]) -> Callable[[Cell], tuple]:
    """A sort key that orders cells as the settings name them, points as their axes count."""
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
    """One JSON object with its keys; a fault says where."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(found).__name__}")
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    return found


def _epochs(path: Path) -> Iterator[Row]:
    """The log's records of epochs; of a last line that a kill tore nothing."""
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
            raise ValueError(f"{where}: invalid JSON: {error}") from None
        if "cell" not in found:  # a line with it is the runner's bookkeeping
            yield _whole(found, where, EPOCH_KEYS)


def load_run(folder: Path) -> Run:
    """Read the files of a finished or partly finished run.

    Args:
        folder: The run's folder, with config.json, summary.json and metrics.jsonl; without the
            last, as results are stored, there are no traces.

    Raises:
        FileNotFoundError: The folder, its config.json or its summary.json is missing.
        ValueError: A file is not what it should be; the message names the file and the line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    for name in ("config.json", "summary.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: is it a run of experiments.grok?")
    path = folder / "summary.json"
    config = _whole(read_json(folder / "config.json"), f"{folder / 'config.json'}", CONFIG_KEYS)
    summary = _whole(read_json(path), f"{path}", ("cells_total", "cells"))
    for place, row in enumerate(summary["cells"], start=1):
        _whole(row, f"{path}, cell {place}", ROW_KEYS)
    traces: dict[Cell, list[Row]] = {}
    for row in _epochs(folder / "metrics.jsonl"):
        trace = traces.setdefault(Cell.of(row), [])
        if trace and row["epoch"] <= trace[-1]["epoch"]:
            trace.clear()  # a cell that was cut off and then trained again from its start
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
    """The median where some values are known only to lie above a bound.

    A missing value ranks as infinite. If the median is then finite it is exact. If not, it is
    bounded from below by the median with each missing value at its bound.

    Args:
        values: The values, None for a missing one.
        bounds: For each value, what it exceeds if it is missing.
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
    """The finished cells per panel and optimizer, in the order they first appear.

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


# --- What cells took to grok -------------------------------------------------------------------

# XLA counts nothing of a decomposition and one pass of a loop, so that their FLOPs are not known.
UNCOUNTED = frozenset((
    "polar", "low_rank", "low_rank_subspace", "dion", "splus", "splus_adamw", "soap", "soap_muon",
    "optax_muon",
))  # fmt: skip


def known(optimizer: str, unit: str) -> bool:
    """Whether an optimizer's cost is known in a unit."""
    return unit != "FLOP" or optimizer not in UNCOUNTED


def apart(values: Collection[float]) -> bool:
    """Whether values differ by more than what XLA's folding of constants does: 0.04 % of FLOPs."""
    return max(values, default=0) > 1.01 * min(values, default=0)


def swept(run: Run) -> dict[str, list[str]]:
    """The settings that differ between the cells of each optimizer."""
    points = [(cell.optimizer, grid.values(cell.point)) for cell in run.cells]
    return {
        name: list(dict.fromkeys(s for owner, point in points if owner == name for s in point))
        for name in run.optimizers()
    }


def plain(setting: str) -> str:
    """A setting's name for readers: "learning rate" for "muon.learning-rate"."""
    return setting.split(".")[-1].replace("-", " ").replace("_", " ")


def numeric(values: Iterable[float | str]) -> bool:
    """Whether all values of a setting are numbers, and none is a word."""
    return not any(isinstance(value, str) for value in values)


def ordered(values: Iterable[float | str]) -> list[float | str]:
    """A setting's values, each once: numbers by size, words as they come.

    Example:
        >>> ordered([64, 32, 64]), ordered(["spectral", "mup", "spectral"])
        ([32, 64], ['spectral', 'mup'])
    """
    found = list(dict.fromkeys(values))
    return sorted(found) if numeric(found) else found


def cost(run: Run, row: Row, unit: str) -> float:
    """What a cell took to its sustained grokking epoch, or to its budget."""
    return value(row, unit) or bound(row, unit, run.budget)


def counts(run: Run) -> str:
    """How many cells there are, and how many are censored and whose; a sentence."""
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
    """Whose FLOPs are not known, and why, in a sentence; "" where all are."""
    names = "; ".join(optimizer_label(n) for n in run.optimizers() if not known(n, "FLOP"))
    why = "XLA's count omits decompositions and the repetitions of loops"
    return f"FLOPs of {names} are unknown (–): {why}." if names else ""
