"""The figures of a sweep: lines over one setting, heat maps over two."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

from experiments.grok import grid
from experiments.grok.report_data import (
    UNITS,
    Arm,
    Median,
    Row,
    Run,
    apart,
    cost,
    counts,
    known,
    numeric,
    ordered,
    plain,
    swept,
    uncounted,
)
from experiments.report.figures import (
    BEYOND,
    POINT_MARK,
    legend,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
)
from experiments.report.text import number

Value = float | str
"""Of a setting."""
HEAT_COLORS = "viridis_r"


class Spot(NamedTuple):
    """What is known at one pair of values: the costs that are, their median, those censored."""

    known: list[float]
    median: Median
    censored: int


def lines_figure(run: Run) -> Figure:
    """Cost to grok against the one setting that is swept, a panel for each unit."""
    (setting,) = {plain(s) for settings in swept(run).values() for s in settings}
    ticks = ordered(x for cell in run.cells for x in grid.values(cell.point).values())
    # Words, and numbers that begin at 0, have no logarithms: they lie side by side in their order.
    log = numeric(ticks) and ticks[0] > 0
    places = {x: float(x) if log else float(i) for i, x in enumerate(ticks)}
    figure = new_figure(8.4, 5.0)
    *panels, notes = figure.subplots(2, 3).flat
    for axes, unit in zip(panels, UNITS, strict=True):
        _draw_lines(axes, run, places, unit)
        axes.set_title(unit, loc="left")
        unknown = [optimizer_label(n) for n in run.optimizers() if not known(n, unit)]
        if unknown:
            text = textwrap.fill(f"– {'; '.join(unknown)}", 32)
            axes.set_title(text, loc="right", fontsize=7, fontweight="normal")
        axes.set_xlabel(setting)
        if log:
            axes.set_xscale("log", base=2)
        tilt = 45 if len(ticks) > 5 or not numeric(ticks) else 0
        axes.set_xticks([*places.values()], [*map(_label, places)], rotation=tilt)
        axes.set_yscale("log")
        axes.margins(0.05, 0.15)  # for what stands above a triangle
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(NullFormatter())
    notes.set_axis_off()
    told = [textwrap.fill(text, 40) for text in (counts(run), uncounted(run)) if text]
    notes.text(0, 1, "\n\n".join(told), va="top", fontsize=8, transform=notes.transAxes)
    others = [
        legend_line("median, where known", lw=2),
        legend_line("one cell", **POINT_MARK),
        legend_line("censored, at the budget; ×n: n trainings", **BEYOND),
    ]
    if not all(swept(run).values()):
        others.append(legend_line("not swept, median; dotted: a bound", lw=1.4, ls="--"))
    legend(figure, run.optimizers(), *others, columns=3)
    return figure


def _label(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _draw_lines(axes: Axes, run: Run, places: Mapping[Value, float], unit: str) -> None:
    censored: dict[Value, dict[str, list[float]]] = {}
    unswept = [name for name, own in swept(run).items() if not own and known(name, unit)]
    for name, own in swept(run).items():
        rows = run.of(None, name)
        if not rows or not known(name, unit):
            continue
        color = optimizer_color(name)
        if not own:
            level = Arm.of(run, rows).median(unit)
            # Lines that coincide take turns: each begins its dashes where another one's end.
            turn = (5 * unswept.index(name), (5, 5 * len(unswept) - 5 or 3))
            ends = [min(places.values()), max(places.values())]
            style = ":" if level.at_least else turn
            axes.plot(ends, [level.value] * 2, color=color, lw=1.6, ls=style)
            continue
        by_value: dict[Value, list[Row]] = {}
        for row in rows:
            if row["point"]:
                by_value.setdefault(grid.values(row["point"])[own[0]], []).append(row)
        # A line through bounds would show the budget's course, which falls in steps over batches.
        medians = {x: Arm.of(run, by_value[x]).median(unit) for x in places if x in by_value}
        line = {places[x]: median.value for x, median in medians.items() if not median.at_least}
        axes.plot([*line], [*line.values()], color=color, lw=2)
        for x, cells in by_value.items():
            for row in cells:
                at = cost(run, row, unit)
                if row["censored"]:
                    censored.setdefault(x, {}).setdefault(name, []).append(at)
                else:
                    axes.plot(places[x], at, color=color, zorder=4, clip_on=False, **POINT_MARK)
    for x, costs in censored.items():
        _draw_censored(axes, places[x], costs, room=150 / len(places))


def _draw_censored(
    axes: Axes, place: float, costs: Mapping[str, Sequence[float]], room: float
) -> None:
    """A triangle for each optimizer's censored cells at a value, side by side within `room` points.

    Their budgets cost the same, but for seconds; where a step does too, so do all optimizers'.
    """
    step = min(11, room / len(costs))
    for i, (name, budgets) in enumerate(costs.items()):
        aside = step * (i - (len(costs) - 1) / 2)
        where = offset_copy(axes.transData, axes.figure, x=aside, units="points")
        style = BEYOND | {"color": optimizer_color(name)}
        at = statistics.median(budgets)
        axes.update_datalim([(place, at)])  # which an offset marker does not do
        axes.plot(place, at, transform=where, zorder=3, clip_on=False, **style)
        if len(budgets) > 1:
            above = offset_copy(where, axes.figure, y=4.5, units="points")
            text = f"×{len(budgets)}"
            axes.text(place, at, text, transform=above, ha="center", fontsize=7)


def heat_figure(run: Run) -> Figure:
    """The median cost to grok over two settings, a heat map for each optimizer and unit."""
    names = [name for name, settings in swept(run).items() if len(settings) == 2]
    units = _units(run, names)
    tables = {(unit, name): _table(run, name, unit) for unit in units for name in names}
    lines, columns = (max(len(values[i]) for values, _ in tables.values()) for i in (0, 1))
    width, height = max(4.2, 0.75 * columns), max(3.4, 0.5 * lines + 0.6)
    figure = new_figure(width * len(names), height * len(units))
    all_axes = figure.subplots(len(units), len(names), squeeze=False)
    for line, unit in zip(all_axes, units, strict=True):
        spots = [spot for name in names for spot in tables[unit, name][1].values()]
        medians = [math.log(spot.median.value) for spot in spots if not spot.median.at_least]
        low, high = min(medians, default=0.0), max(medians, default=1.0)
        scale = LogNorm(math.exp(low), math.exp(max(high, low + 1e-6)))
        for axes, name in zip(line, names, strict=True):
            _draw_heat(axes, *tables[unit, name], scale)
            axes.set_title(f"{optimizer_label(name)}: {unit}", loc="left")
            axes.set_ylabel(plain(swept(run)[name][0]))
            axes.set_xlabel(plain(swept(run)[name][1]))
        bar = figure.colorbar(ScalarMappable(scale, HEAT_COLORS), ax=line, aspect=30)
        seeds = {len(spot.known) + spot.censored for spot in spots}
        bar.set_label(f"{unit} to grok, " + ("one seed" if seeds == {1} else "median of the seeds"))
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(lambda value, _: _amount(value))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _units(run: Run, names: Sequence[str]) -> list[str]:
    """Epochs, and those in which an epoch of an optimizer costs more at some settings."""
    rows = {name: run.of(None, name) for name in names}
    return ["epochs"] + [
        unit
        for unit in ("tokens", "steps", "FLOP")
        if any(known(n, unit) and apart([*map(UNITS[unit], own)]) for n, own in rows.items())
    ]


def _table(run: Run, name: str, unit: str) -> tuple[list[list[Value]], dict[tuple[int, int], Spot]]:
    """The values of two settings, and what is known at their places in these lists."""
    first, second = swept(run)[name]
    cells: dict[tuple[Value, Value], list[Row]] = {}
    for row in run.rows:
        at = grid.values(row["point"])
        if row["optimizer"] == name and len(at) == 2:
            cells.setdefault((at[first], at[second]), []).append(row)
    values = [ordered(key[place] for key in cells) for place in (0, 1)]
    spots = {
        (values[0].index(x), values[1].index(y)): Spot(
            sorted(cost(run, row, unit) for row in rows if not row["censored"]),
            Arm.of(run, rows).median(unit),
            sum(row["censored"] for row in rows),
        )
        for (x, y), rows in cells.items()
        if known(name, unit)
    }
    return values, spots


def _draw_heat(
    axes: Axes,
    values: list[list[Value]],
    spots: Mapping[tuple[int, int], Spot],
    scale: LogNorm,
) -> None:
    colors = np.full([len(v) for v in values], np.nan)
    for i, j in np.ndindex(*colors.shape):
        text, color = "–", "k"
        if (i, j) in spots:
            own, median, censored = spots[i, j]
            text = median.text(_amount) + (f"\n{censored} censored" if censored else "")
            if len(own) > 1 and not censored:
                text += f"\n{_amount(own[0])} to {_amount(own[-1])}"
            # A bound has no colour: in steps a large batch's budget is small, and no cost.
            if not median.at_least:
                colors[i, j] = median.value
                color = "w" if scale(median.value) > 0.5 else "k"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axes.imshow(colors, cmap=HEAT_COLORS, norm=scale, aspect="auto")
    axes.set_facecolor("#dddddd")
    axes.grid(visible=False)
    axes.set_yticks(range(len(values[0])), [*map(_label, values[0])])
    axes.set_xticks(range(len(values[1])), [*map(_label, values[1])])


def _amount(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return number(rounded) if value < 10_000 else EngFormatter(sep="")(rounded)
