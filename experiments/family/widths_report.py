"""Report of the width sweep: the best rate of every width, under each shape scale."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report import arms
from experiments.report.figures import rates_figure
from experiments.report.page import Column, Picture, Report, Section, Table
from experiments.report.text import form, signed, told
from experiments.sweep import Files, optimum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(arms.Arm):
    """One width, which is its `optimizer` too, under one shape scale.

    Attributes:
        optimum: the rate at the bottom of a parabola through the best rate and its neighbours.
    """

    width: int
    optimum: float

    @property
    def mark(self) -> tuple[float, float]:
        return self.optimum, self.loss


class Transfer(NamedTuple):
    """One shape scale.

    Attributes:
        drift: least-squares slope of log2(optimum) over log2(width), the powers of two by which the
            best rate moves when the width doubles; None with one width.
    """

    scale: str
    lines: list[Line]
    drift: float | None


def aggregate(files: Files) -> list[Transfer]:
    """The finished cells by shape scale and width; of stored results only what they have."""
    found: dict[str, list[Line]] = {}
    for (scale, width), (rows, _) in sorted(
        arms.grouped(files, "scale", "width").items(), key=lambda item: item[0][1]
    ):
        own = arms.of_cells(rows)
        best = optimum(own["losses"], own["best"].rate)
        line = Line(optimizer=f"width {width}", width=width, optimum=best, **own)
        found.setdefault(scale, []).append(line)
    scales = dict.fromkeys(row["scale"] for row in files.rows)
    return [Transfer(scale, found[scale], _drift(found[scale])) for scale in scales]


def _drift(lines: Sequence[Line]) -> float | None:
    if len(lines) < 2:
        return None
    x, y = np.log2([[line.width, line.optimum] for line in lines]).T
    return float(np.polyfit(x, y, 1)[0])


def as_json(transfer: Transfer) -> dict[str, Any]:
    """A scale's row of summary.json."""
    lines = {str(line.width): line for line in transfer.lines}
    return {
        "scale": transfer.scale,
        "drift": transfer.drift,
        "optimum": {width: line.optimum for width, line in lines.items()},
        "at_edge": {width: line.at_edge for width, line in lines.items()},
        "arms": {width: line.as_json() for width, line in lines.items()},
    }


class Told(NamedTuple):
    """A line of the table; what is not stored is None."""

    scale: str
    width: str
    optimum: float
    at_edge: bool
    drift: float | None
    rate: float | None
    loss: float | None


def _arm(scale: dict[str, Any], width: str) -> dict[str, Any]:
    return scale.get("arms", {}).get(width, {})


def table_rows(scales: Sequence[dict[str, Any]]) -> list[Told]:
    """A row for each width of summary.json's scales."""
    return [
        Told(
            scale["scale"],
            width,
            best,
            scale["at_edge"][width],
            scale["drift"],
            *(
                scale.get("arms", {}).get(width, {}).get(k)
                for k in ("best_rate", "validation_loss")
            ),
        )
        for scale in scales
        for width, best in scale["optimum"].items()
    ]


def sentences(scales: Sequence[dict[str, Any]]) -> list[str]:
    """The result in plain sentences."""
    found = []
    for scale in scales:
        best = scale["optimum"].items()
        rates = ", ".join(f"{rate:.3g} at width {width}" for width, rate in best)
        text = f"{scale['scale']}: the best rate is {rates}"
        if scale["drift"] is not None:
            text += f", a drift of {signed(scale['drift'], 2)} powers of two a doubling"
        if any(scale["at_edge"].values()):
            text += " (a best rate lies at the edge of those tried)"
        found.append(text + ".")
    return found


COLUMNS: tuple[Column, ...] = (
    ("scale", "scale", lambda row: row.scale),
    ("width", "width", lambda row: row.width),
    ("best rate", "best rate", lambda row: form(row.rate, "g") + " (edge)" * row.at_edge),
    ("optimum", "optimum", lambda row: form(row.optimum, ".3g")),
    ("loss", "loss", lambda row: form(row.loss, ".3f")),
    (
        "drift a doubling",
        "drift a doubling",
        lambda row: "–" if row.drift is None else signed(row.drift, 2),
    ),
)
CAPTION = (
    "Final validation loss, mean over the seeds. Optimum: the lowest point of a parabola in "
    "log(rate) through the best rate and its two neighbours. Drift: slope of log2(optimum) over "
    "log2(width); 0 is perfect transfer, −0.5 is what a spectral norm that grows as the root of "
    "the width asks for."
)


def widths_figure(transfers: Sequence[Transfer]) -> Figure:
    """Final loss against learning rate: a panel for each scale, a line for each width."""
    widths = sorted({line.width for transfer in transfers for line in transfer.lines})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(widths)))
    colors = {f"width {width}": shade for width, shade in zip(widths, shades, strict=True)}
    panels = {
        of.scale + ("" if of.drift is None else f", drift {signed(of.drift, 2)}"): of.lines
        for of in transfers
    }
    return rates_figure(
        panels,
        style=lambda name: {"color": colors[name]},
        label=str,
        width=2.9,
        unit="nats a byte",
    )


def report(folder: Path) -> Report:
    """The best rate by width.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = arms.load(folder)
    transfers = aggregate(files)
    scales = [as_json(of) for of in transfers] or files.summary.get("scales", [])
    table = Table(COLUMNS, table_rows(scales), CAPTION, "Best rate by width", names=2).known()
    caption = told(
        "Final validation loss against Muon's learning rate. The embedding, the gains and the head "
        "have AdamW's rate {adamw[learning_rate]} at every width; the logits carry a factor of "
        "128 / width.",
        files.config,
    )
    alt = "Final loss against learning rate, a panel for each shape scale, a line for each width."
    figure = Picture("widths", lambda: widths_figure(transfers), caption, alt)
    return arms.report(
        "Learning-rate transfer over the width",
        folder,
        files,
        "a shape scale, a width, a learning rate and a seed",
        sentences(scales),
        table,
        [Section("widths", "Best rate by width", [table, figure if transfers else None])],
        scales=scales,
    )
