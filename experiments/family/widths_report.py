"""Report of the width sweep: the best rate of every width, under each shape scale."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report import arms
from experiments.report.figures import rates_figure
from experiments.report.page import Column, Picture, Report, Table
from experiments.report.text import form, signed, told
from experiments.sweep import Files, optimum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(arms.Arm):
    """One width, which is its `optimizer` too, under one shape scale.

    Attributes:
        optimum: The rate at the minimum of a parabola through the best rate and its neighbours.
    """

    optimum: float

    @property
    def mark(self) -> tuple[float, float]:
        return self.optimum, self.loss


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One shape scale, by width.

    Attributes:
        optimum, at_edge: of each width; stored results have no `lines`.
    """

    scale: str
    lines: list[Line]
    optimum: dict[str, float]
    at_edge: dict[str, bool]

    @property
    def drift(self) -> float | None:
        """Least-squares slope of log2(optimum) over log2(width); None with one width.

        These are the powers of two by which the best rate moves when the width doubles.
        """
        if len(self.optimum) < 2:
            return None
        pairs = [[float(width), best] for width, best in self.optimum.items()]
        return float(np.polyfit(*np.log2(pairs).T, 1)[0])

    @property
    def drift_text(self) -> str:
        return "–" if self.drift is None else signed(self.drift, 2)

    def as_json(self) -> dict[str, Any]:
        """Its row of summary.json."""
        own = {"scale": self.scale, "drift": self.drift, "optimum": self.optimum}
        lines = {line.optimizer: line.as_json() for line in self.lines}
        return own | {"at_edge": self.at_edge, "arms": lines}


def aggregate(files: Files) -> list[Transfer]:
    """The finished cells by shape scale and width; of stored results what these have."""
    if not files.rows:
        stored = files.summary.get("scales", [])
        return [Transfer(of["scale"], [], of["optimum"], of["at_edge"]) for of in stored]
    found: dict[str, list[Line]] = {row["scale"]: [] for row in files.rows}
    for (width, scale), (rows, _) in sorted(arms.grouped(files, "width", "scale").items()):
        own = arms.of_cells(rows)
        best = optimum(own["losses"], own["best"].rate)
        found[scale].append(Line(optimizer=str(width), optimum=best, **own))
    return [
        Transfer(
            scale,
            lines,
            {line.optimizer: line.optimum for line in lines},
            {line.optimizer: line.at_edge for line in lines},
        )
        for scale, lines in found.items()
    ]


def sentences(transfers: Sequence[Transfer]) -> list[str]:
    """Returns the results in sentences whose numbers are computed from the run."""
    found = []
    for of in transfers:
        rates = ", ".join(f"{best:.3g} at width {width}" for width, best in of.optimum.items())
        text = f"{of.scale}: the best rate is {rates}"
        if of.drift is not None:
            text += f", a drift of {of.drift_text} powers of two per doubling of the width"
        edge = " (a best rate is the highest or lowest tried)"
        found.append(f"{text}{edge if any(of.at_edge.values()) else ''}.")
    return found


Row = tuple[Transfer, str, Line | None]
COLUMNS: tuple[Column, ...] = (
    ("scale", "scale", lambda row: row[0].scale),
    ("width", "width", lambda row: row[1]),
    ("best rate", "best rate", lambda row: arms.RATE[2](row[2]) if row[2] else "–"),
    ("optimum", "optimum", lambda row: form(row[0].optimum[row[1]], ".3g")),
    ("loss", "loss", lambda row: form(row[2] and row[2].loss, ".3f")),
    ("drift a doubling", "drift a doubling", lambda row: row[0].drift_text),
)
CAPTION = (
    "Final validation loss, mean over the seeds. Optimum: the lowest point of a parabola in "
    "log(rate) through the best rate and its two neighbours. Drift: slope of log2(optimum) over "
    "log2(width); 0 is perfect transfer, −0.5 is required by a spectral norm that grows as the "
    "square root of the width."
)
FIGURE = (
    "Final validation loss against Muon's learning rate. AdamW trains embedding, gains and head "
    "at the rate {adamw[learning_rate]} at every width; logits are multiplied by 128 / width."
)


def widths_figure(transfers: Sequence[Transfer]) -> Figure:
    """Final loss against learning rate: a panel for each scale, a line for each width."""
    widths = sorted({width for of in transfers for width in of.optimum}, key=int)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(widths)))
    colors = dict(zip(widths, shades, strict=True))
    return rates_figure(
        {f"{of.scale}, drift {of.drift_text}": of.lines for of in transfers},
        style=lambda width: {"color": colors[width]},
        label="width {}".format,
        width=2.9,
        unit="nats per byte",
    )


def report(folder: Path) -> Report:
    """Returns the report of a sweep over sizes: the best rate of each."""
    files = arms.load(folder)
    transfers = aggregate(files)
    rows: list[Row] = [
        (of, width, next((line for line in of.lines if line.optimizer == width), None))
        for of in transfers
        for width in of.optimum
    ]
    table = Table(COLUMNS, rows, CAPTION, "Best rate by width", names=2).known()
    figure = Picture(
        "widths",
        lambda: widths_figure(transfers),
        told(FIGURE, files.config),
        "Final loss against learning rate, a panel for each shape scale, a line for each width.",
    )
    return arms.report(
        "Learning-rate transfer over the width",
        folder,
        files,
        "a shape scale, a width, a learning rate and a seed",
        sentences(transfers),
        table,
        [figure] if files.rows else [],
        scales=[of.as_json() for of in transfers],
    )
