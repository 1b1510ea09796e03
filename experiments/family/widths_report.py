"""Report of the width sweep: reads a run's files, draws its figure, writes report.html.

It never trains: `python -m experiments.family.widths_report FOLDER`.
"""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.commands import reporting
from experiments.figures import (
    GROKKED_MARK,
    POINT_MARK,
    figure_style,
    legend_line,
    new_figure,
    plain_log_axis,
)
from experiments.pages import save_figure, text_table, write_page
from experiments.runs import write_json
from experiments.sweep import Best, Row, best, load_run, losses_by_rate, mean, optimum


class Line(NamedTuple):
    """One width under one shape scale.

    Attributes:
        losses: mean final loss by rate, ascending; infinite where a seed diverged.
        optimum: the rate at the bottom of a parabola through the best rate and its neighbours.
    """

    width: int
    losses: dict[float, float]
    best: Best
    optimum: float


class Transfer(NamedTuple):
    """One shape scale.

    Attributes:
        drift: least-squares slope of log2(optimum) over log2(width), the powers of two by which the
            best rate moves when the width doubles; None with one width.
    """

    scale: str
    lines: list[Line]
    drift: float | None


def aggregate(rows: Sequence[Row]) -> list[Transfer]:
    """The finished cells by shape scale and width."""
    return [_transfer(scale, rows) for scale in dict.fromkeys(row["scale"] for row in rows)]


def _transfer(scale: str, rows: Sequence[Row]) -> Transfer:
    own = [row for row in rows if row["scale"] == scale]
    lines = []
    for width in sorted({row["width"] for row in own}):
        cells = [row for row in own if row["width"] == width]
        losses = {rate: mean(seeds) for rate, seeds in losses_by_rate(cells).items()}
        top = best(cells)
        lines.append(Line(width, losses, top, optimum(losses, top.rate)))
    drift = None
    if len(lines) > 1:
        x, y = np.log2([[line.width, line.optimum] for line in lines]).T
        drift = float(np.polyfit(x, y, 1)[0])
    return Transfer(scale, lines, drift)


def sentences(transfers: Sequence[Transfer]) -> list[str]:
    """The result in plain sentences."""
    found = []
    for transfer in transfers:
        rates = ", ".join(f"{line.optimum:.3g} at width {line.width}" for line in transfer.lines)
        text = f"{transfer.scale}: the best rate is {rates}"
        if transfer.drift is not None:
            text += f", a drift of {_signed(transfer.drift)} powers of two a doubling"
        if any(line.best.at_edge for line in transfer.lines):
            text += " (a best rate lies at the edge of those tried)"
        found.append(text + ".")
    return found


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")  # no negative zero


COLUMNS = ("scale", "width", "best rate", "optimum", "loss", "drift a doubling")


def table_rows(transfers: Sequence[Transfer]) -> list[list[str]]:
    """The table's text: a row for each width."""
    return [
        [
            transfer.scale,
            str(line.width),
            f"{line.best.rate:g}" + (" (edge)" if line.best.at_edge else ""),
            f"{line.optimum:.3g}",
            f"{line.best.mean:.3f}",
            "–" if transfer.drift is None else _signed(transfer.drift),
        ]
        for transfer in transfers
        for line in transfer.lines
    ]


def terminal_table(rows: Sequence[Row]) -> Table:
    """The table for the terminal, with the numbers of the HTML table."""
    columns = [(name, name, operator.itemgetter(i)) for i, name in enumerate(COLUMNS)]
    return text_table("Best rate by width", columns, table_rows(aggregate(rows)))


def widths_figure(transfers: Sequence[Transfer]) -> Figure:
    """Final loss against learning rate: a panel for each scale, a line for each width."""
    figure = new_figure(max(4.4, 2.9 * len(transfers)), 3.4)
    grid = figure.subplots(1, len(transfers), squeeze=False, sharey=True)[0]
    widths = sorted({line.width for transfer in transfers for line in transfer.lines})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.85, 0.1, len(widths)))
    colors = dict(zip(widths, shades, strict=True))
    for transfer, axes in zip(transfers, grid, strict=True):
        for line in transfer.lines:
            _draw(axes, line, colors[line.width])
        drift = "" if transfer.drift is None else f", drift {_signed(transfer.drift)}"
        axes.set_title(f"{transfer.scale}{drift}", loc="left")
        axes.set_xlabel("learning rate")
        plain_log_axis(axes, "x")
    grid[0].set_ylabel("final loss (nats a byte)")
    handles = [legend_line(f"width {width}", colors[width], lw=2) for width in widths]
    handles += [legend_line("one rate", **POINT_MARK), legend_line("optimum", **GROKKED_MARK)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def _draw(axes: Axes, line: Line, color: Any) -> None:
    finite = {rate: loss for rate, loss in line.losses.items() if math.isfinite(loss)}
    axes.plot([*finite], [*finite.values()], color=color, lw=1.4)
    axes.plot([*finite], [*finite.values()], color=color, **POINT_MARK)
    if math.isfinite(line.best.mean):
        axes.plot(line.optimum, line.best.mean, color=color, zorder=5, **GROKKED_MARK)


def write_report(folder: Path) -> Path:
    """Writes widths.png, report.html and the drifts of summary.json into a run's folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is not what it should be; the message names it.
    """
    files = load_run(folder)
    transfers = aggregate(files.rows)
    arms = [
        {
            "scale": transfer.scale,
            "drift": transfer.drift,
            "optimum": {str(line.width): line.optimum for line in transfer.lines},
            "at_edge": {str(line.width): line.best.at_edge for line in transfer.lines},
        }
        for transfer in transfers
    ]
    write_json(folder / "summary.json", files.summary | {"scales": arms})
    with figure_style():
        figure = save_figure(widths_figure(transfers), folder / "widths.png")
    return write_page(
        Path(__file__).parent / "widths.html.jinja",
        folder / "report.html",
        study="Learning-rate transfer over the width",
        command="experiments.family.widths_report",
        config=files.config,
        machine=files.summary["machine"],
        version=files.summary["version"],
        abstract=sentences(transfers),
        columns=COLUMNS,
        rows=table_rows(transfers),
        figure=figure,
        files=files,
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a width sweep again from its files; nothing is trained.

    Args:
        folder: The run's folder, e.g. runs/widths/NAME.
    """
    with reporting(folder):
        path = write_report(folder)
        Console().print(terminal_table(load_run(folder).rows), Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.family.widths_report")
