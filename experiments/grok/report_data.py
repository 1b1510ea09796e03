"""What the report knows of a grokking run: its files, and the cells aggregated per arm."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments import sealed
from experiments.commands import print_warning
from experiments.grok import grid
from experiments.grok.config import Cell, Panel
from experiments.json_files import loads

CONFIG_KEYS = ("tasks", "softmax", "optimizers", "epochs", "grid")
EPOCH_KEYS = (*Cell._fields, "epoch", "train_accuracy")
ROW_KEYS = (
    *Cell._fields, "memorized_epoch", "first_crossing_epoch", "grok_epoch",
    "grok_epoch_sustained", "grok_epoch_near_best", "collapse_epoch", "delay", "censored",
    "diverged", "epochs_run", "seconds", "steps_per_second", "seconds_to_grok", "flops_to_grok",
    "steps_per_epoch", "tokens_per_epoch", "step_flops", "parameters",
)  # fmt: skip

Row = dict[str, Any]


class Median(NamedTuple):
    """A median; `at_least` says that censored cells leave only a lower bound of it."""

    value: float
    at_least: bool = False


@dataclass(frozen=True)
class Arm:
    """What the seeds of one optimizer did on one panel."""

    panel: Panel
    optimizer: str
    n: int
    censored: int
    diverged: int
    collapsed: int
    below_after_grok: float | None  # share of the evaluations after grokking that is below 95 %
    memorized: Median
    grok_first: Median
    grok_sustained: Median
    grok_near_best: Median
    delay: Median
    seconds_to_grok: Median
    flops_to_grok: Median
    steps_per_second: Median


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

    def optimizers(self) -> list[str]:
        """The optimizers with a finished or begun cell, in the settings' order."""
        names = {cell.optimizer for cell in self.cells}
        return sorted(names, key=_place(self.config["optimizers"]))

    def panels(self) -> list[Panel]:
        """The panels with a finished or begun cell, in the settings' order."""
        return list(dict.fromkeys(cell.panel for cell in self.cells))

    def of(self, panel: Panel, optimizer: str) -> list[Row]:
        """An optimizer's finished cells on a panel."""
        return [row for row in self.rows if _arm(row) == (panel, optimizer)]


def _arm(row: Row) -> tuple[Panel, str]:
    cell = Cell.of(row)
    return cell.panel, cell.optimizer


def _place(names: Sequence[str]) -> Callable[[str], tuple]:
    """A sort key that puts names in order, unknown ones last and by the alphabet."""
    return lambda name: (names.index(name), "") if name in names else (len(names), name)


def _rank(config: dict[str, Any]) -> Callable[[Cell], tuple]:
    """A sort key that orders cells as the settings name them, points as their axes count."""
    tasks, softmax, optimizers = (_place(config[key]) for key in ("tasks", "softmax", "optimizers"))
    axes = [grid.axis(text) for text in config["grid"]]
    points = [""]
    for name in dict.fromkeys([*config["optimizers"]]):
        points += grid.points(axes, name)
    point = _place(list(dict.fromkeys(points)))

    def rank(cell: Cell) -> tuple:
        where = tasks(cell.task), softmax(cell.softmax), point(cell.point)
        return *where, optimizers(cell.optimizer), cell.seed

    return rank


def _parse(text: bytes, path: Path, keys: Sequence[str], line: int | None = None) -> dict[str, Any]:
    """One JSON object; a fault names the file and the line."""
    where = f"{path}, line {line}" if line else f"{path}"
    try:
        value = loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is wanted, found {type(value).__name__}")
    # A line with "cell" is the runner's bookkeeping and has keys of its own.
    missing = [] if line and "cell" in value else [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    return value


def _is_json(text: bytes) -> bool:
    try:
        loads(text)
    except ValueError:
        return False
    return True


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
    path = folder / "config.json"
    config = _parse(path.read_bytes(), path, CONFIG_KEYS)
    path = folder / "summary.json"
    summary = _parse(path.read_bytes(), path, ("cells_total", "cells"))
    for number, row in enumerate(summary["cells"], start=1):
        if missing := [key for key in ROW_KEYS if key not in row]:
            raise ValueError(f"{path}: cell {number} lacks {', '.join(missing)}")

    path = folder / "metrics.jsonl"
    traces: dict[Cell, list[Row]] = {}
    log = sealed.read(path)
    for damage in log.damage:
        print_warning(f"{path} is damaged: {damage}.")
    whole = [*log.text, log.torn] if _is_json(log.torn) else log.text
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        row = _parse(line, path, (*EPOCH_KEYS, "validation_accuracy"), number)
        if "cell" in row:
            continue
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


def sustained_median(rows: Sequence[Row], budget: int) -> Median:
    """The median sustained grokking epoch of some cells, censored ones at the budget."""
    return censored_median((row["grok_epoch_sustained"] for row in rows), [budget] * len(rows))


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
        groups.setdefault(_arm(row), []).append(row)

    def arm(key: tuple[Panel, str], cells: list[Row]) -> Arm:
        def median(name: str, bound: Callable[[Row], float]) -> Median:
            return censored_median((row[name] for row in cells), map(bound, cells))

        def seconds(row: Row) -> float:
            return row["seconds"] or 0.0

        def flops(row: Row) -> float:
            return seconds(row) * (row["steps_per_second"] or 0.0) * (row["step_flops"] or 0.0)

        later = sum(row.get("evaluations_after_grok", 0) for row in cells)
        below = sum(row.get("below_after_grok", 0) for row in cells)
        speeds = [row["steps_per_second"] for row in cells if row["steps_per_second"] is not None]
        return Arm(
            *key,
            n=len(cells),
            censored=sum(row["censored"] for row in cells),
            diverged=sum(row["diverged"] for row in cells),
            collapsed=sum(row["collapse_epoch"] is not None for row in cells),
            below_after_grok=below / later if later else None,
            memorized=median("memorized_epoch", lambda _: budget),
            grok_first=median("grok_epoch", lambda _: budget),
            grok_sustained=sustained_median(cells, budget),
            grok_near_best=median("grok_epoch_near_best", lambda _: budget),
            delay=median("delay", lambda row: budget - (row["memorized_epoch"] or budget)),
            seconds_to_grok=median("seconds_to_grok", seconds),
            flops_to_grok=median("flops_to_grok", flops),
            steps_per_second=censored_median(speeds, speeds),
        )

    return [arm(key, cells) for key, cells in groups.items()]
