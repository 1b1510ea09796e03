"""Report of the width sweep: the best rate of every width or depth, under each shape scale."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report import arms
from experiments.report.figures import rates_figure
from experiments.report.page import Column, Picture, Report, Table
from experiments.report.text import form, signed, told
from experiments.sweep import Files, load_run, optimum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(arms.Arm):
    """One width or depth, which is its `optimizer` too, under one shape scale."""

    @property
    def optimum(self) -> float:
        """The rate at the minimum of a parabola through the best rate and its neighbours."""
        return optimum(self.losses, self.best.rate)

    @property
    def mark(self) -> tuple[float, float]:
        return self.optimum, self.loss


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One shape scale, by width or depth.

    Attributes:
        lines: The results of each size. Empty for stored results.
        optimum, at_edge: The best rate of each size, and whether a further rate may be better.
        over: The name of the size, `"width"` or `"layers"`.
        drift_by_seed: The `drift` of each seed's trainings alone. Empty with one seed.
    """

    scale: str
    lines: list[Line]
    optimum: dict[str, float]
    at_edge: dict[str, bool]
    over: str = "width"
    drift_by_seed: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def drift(self) -> float | None:
        """The change of the optimum with the size. None with one size."""
        return drift_of(self.optimum)

    @property
    def drift_text(self) -> str:
        return "–" if self.drift is None else signed(self.drift, 2)

    def as_json(self) -> dict[str, Any]:
        """Returns the row of summary.json."""
        own = {"scale": self.scale, "over": self.over, "drift": self.drift, "optimum": self.optimum}
        own["drift_by_seed"] = self.drift_by_seed
        lines = {line.optimizer: line.as_json() for line in self.lines}
        return own | {"at_edge": self.at_edge, "arms": lines}


def drift_of(optimum: Mapping[str, float]) -> float | None:
    """Returns the powers of two by which the best rate moves when the size doubles.

    It is the least-squares slope of log2(optimum) over log2(size). None with one size.
    """
    if len(optimum) < 2:
        return None
    pairs = [[float(size), best] for size, best in optimum.items()]
    return float(np.polyfit(*np.log2(pairs).T, 1)[0])


def aggregate(files: Files) -> list[Transfer]:
    """Groups finished cells by shape scale and size."""
    if not files.rows:
        stored = files.summary.get("scales", [])
        return [
            Transfer(of["scale"], [], of["optimum"], of["at_edge"], of.get("over", "width"))
            for of in stored
        ]
    over = "layers" if "layers" in files.rows[0] else "width"
    lines: dict[str, list[Line]] = {row["scale"]: [] for row in files.rows}
    optima: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)  # by scale and seed
    for (size, scale), (rows, _) in sorted(arms.grouped(files, over, "scale").items()):
        lines[scale].append(Line(optimizer=str(size), **arms.of_cells(rows)))
        for seed in sorted({row["seed"] for row in rows}):
            own = arms.of_cells([row for row in rows if row["seed"] == seed])
            optima[scale, str(seed)][str(size)] = optimum(own["losses"], own["best"].rate)
    drifts: dict[str, dict[str, float]] = {scale: {} for scale in lines}
    for (scale, seed), of_size in optima.items():
        if (drift := drift_of(of_size)) is not None:
            drifts[scale][seed] = drift
    return [
        Transfer(
            scale,
            own,
            {line.optimizer: line.optimum for line in own},
            {line.optimizer: line.at_edge for line in own},
            over,
            drifts[scale] if len(drifts[scale]) > 1 else {},
        )
        for scale, own in lines.items()
    ]


def sentences(transfers: Sequence[Transfer]) -> list[str]:
    """Returns the results in sentences whose numbers are computed from the run."""
    found = []
    for of in transfers:
        rates = ", ".join(f"{best:.3g} at {of.over} {size}" for size, best in of.optimum.items())
        text = f"{of.scale}: the best rate is {rates}"
        if of.drift is not None:
            text += f", a drift of {of.drift_text} powers of two per doubling"
        edge = " (a best rate is the highest or lowest tried)"
        found.append(f"{text}{edge if any(of.at_edge.values()) else ''}.")
    return found


Row = tuple[Transfer, str, Line | None]
COLUMNS: tuple[Column, ...] = (
    ("scale", "scale", lambda row: row[0].scale),
    ("width or layers", "size", lambda row: f"{row[0].over} {row[1]}"),
    ("best rate", "best rate", lambda row: arms.RATE[2](row[2]) if row[2] else "–"),
    ("optimum", "optimum", lambda row: form(row[0].optimum[row[1]], ".3g")),
    ("loss", "loss", lambda row: form(row[2] and row[2].loss, ".3f")),
    ("drift a doubling", "drift a doubling", lambda row: row[0].drift_text),
)
CAPTION = (
    "Final validation loss, mean over the seeds. Optimum: the lowest point of a parabola in "
    "log(rate) through the best rate and its two neighbours. Drift: slope of log2(optimum) over "
    "log2 of the width or the number of layers; 0 is perfect transfer, −0.5 is required by a "
    "spectral norm that grows as the square root of the width."
)
FIGURE = (
    "Final validation loss against Muon's learning rate. AdamW trains embedding, gains and head "
    "at the rate {adamw[learning_rate]} at every width; logits are multiplied by 128 / width."
)


def widths_figure(transfers: Sequence[Transfer]) -> Figure:
    """Draws final loss against learning rate, with a panel per scale and a line per size."""
    sizes = sorted({size for of in transfers for size in of.optimum}, key=int)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(sizes)))
    colors = dict(zip(sizes, shades, strict=True))
    return rates_figure(
        {f"{of.scale}, drift {of.drift_text}": of.lines for of in transfers},
        style=lambda size: {"color": colors[size]},
        label=f"{transfers[0].over} {{}}".format,
        width=2.9,
        unit="nats per byte",
    )


def report(folder: Path) -> Report:
    """Returns the report of a sweep over sizes: the best rate of each."""
    files = load_run(folder)
    transfers = aggregate(files)
    rows: list[Row] = [
        (of, size, next((line for line in of.lines if line.optimizer == size), None))
        for of in transfers
        for size in of.optimum
    ]
    table = Table(COLUMNS, rows, CAPTION, "Best rate by size", names=2).known()
    figure = Picture(
        "widths",
        lambda: widths_figure(transfers),
        told(FIGURE, files.config),
        "Final loss against learning rate, a panel for each shape scale, a line for each size.",
    )
    return arms.report(
        "Learning-rate transfer over the size",
        folder,
        files,
        "a shape scale, a size, a learning rate and a seed",
        sentences(transfers),
        table,
        [figure] if files.rows else [],
        scales=[of.as_json() for of in transfers],
    )
