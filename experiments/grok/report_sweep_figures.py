"""The figures of a sweep: lines over one setting and heat maps over two."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence

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
    Run,
    aggregate,
    apart,
    cost,
    counts,
    known,
    numeric,
    ordered,
    plain,
    swept,
    uncounted,
    value,
)
from experiments.report.figures import BEYOND, POINT_MARK, legend, legend_line, new_figure
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.text import number

Value = float | str
"""The value of a setting."""
HEAT_COLORS = "viridis_r"


def lines_figure(run: Run) -> Figure:
    """Draws the cost to grok against the swept setting, with one panel for each unit."""
    (setting,) = {plain(s) for settings in swept(run).values() for s in settings}
    ticks = ordered(x for cell in run.cells for x in grid.values(cell.point).values())
    # Words and 0 have no logarithm. Settings with such values are placed side by side in order.
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
        axes.margins(0.05, 0.15)  # leaves room for text above triangles
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(NullFormatter())
    notes.set_axis_off()
    texts = [textwrap.fill(text, 40) for text in (counts(run), uncounted(run)) if text]
    notes.text(0, 1, "\n\n".join(texts), va="top", fontsize=8, transform=notes.transAxes)
    others = [
        legend_line("median, where known", lw=2),
        legend_line("one training", **POINT_MARK),
        legend_line("censored, at the budget; ×n: n trainings", **BEYOND),
    ]
    if not all(swept(run).values()):
        others.append(legend_line("not swept, median; dotted: a bound", lw=1.4, ls="--"))
    legend(figure, run.optimizers(), *others, columns=3)
    return figure


def settings(run: Run, name: str) -> list[Arm]:
    """Returns an optimizer's cells by swept settings, without cells that have none."""
    arms = aggregate(run.of(None, name), run.budget)
    return [arm for arm in arms if arm.panel.point]


def _label(x: Value) -> str:
    return x if isinstance(x, str) else f"{x:g}"


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
            # The dashes of lines that coincide alternate, so that all lines are visible.
            turn = (5 * unswept.index(name), (5, 5 * len(unswept) - 5 or 3))
            ends = [min(places.values()), max(places.values())]
            style = ":" if level.at_least else turn
            axes.plot(ends, [level.value] * 2, color=color, lw=1.6, ls=style)
            continue
        arms = {grid.values(of.panel.point)[own[0]]: of for of in settings(run, name)}
        # A line through lower bounds would show the budget, not the cost.
        medians = {places[x]: arms[x].median(unit) for x in places if x in arms}
        line = {at: median.value for at, median in medians.items() if not median.at_least}
        axes.plot([*line], [*line.values()], color=color, lw=2)
        for x, arm in arms.items():
            for row in arm.cells:
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
    """Draws a triangle for each optimizer's censored cells, side by side within `room` points.

    Side by side, since the budgets of several optimizers often have the same cost.
    """
    step = min(11, room / len(costs))
    for i, (name, budgets) in enumerate(costs.items()):
        aside = step * (i - (len(costs) - 1) / 2)
        where = offset_copy(axes.transData, axes.figure, x=aside, units="points")
        style = BEYOND | {"color": optimizer_color(name)}
        at = statistics.median(budgets)
        axes.update_datalim([(place, at)])  # plotting with an offset does not update it
        axes.plot(place, at, transform=where, zorder=3, clip_on=False, **style)
        if len(budgets) > 1:
            above = offset_copy(where, axes.figure, y=4.5, units="points")
            text = f"×{len(budgets)}"
            axes.text(place, at, text, transform=above, ha="center", fontsize=7)


def heat_figure(run: Run) -> Figure:
    """Draws the median cost to grok over two settings, one heat map per optimizer and unit."""
    names = [name for name, settings in swept(run).items() if len(settings) == 2]
    units = _units(run, names)
    arms = {name: [a for a in settings(run, name) if " " in a.panel.point] for name in names}
    at = {name: [_values(run, arm) for arm in own] for name, own in arms.items()}
    values = {name: [ordered(pair[i] for pair in own) for i in (0, 1)] for name, own in at.items()}
    lines, columns = (max(len(of[i]) for of in values.values()) for i in (0, 1))
    width, height = max(4.2, 0.75 * columns), max(3.4, 0.5 * lines + 0.6)
    figure = new_figure(width * len(names), height * len(units))
    all_axes = figure.subplots(len(units), len(names), squeeze=False)
    for line, unit in zip(all_axes, units, strict=True):
        counted = {name: arms[name] if known(name, unit) else [] for name in names}
        medians = [arm.median(unit) for own in counted.values() for arm in own]
        costs = [median.value for median in medians if not median.at_least] or [1.0, 2.0]
        scale = LogNorm(min(costs), max(*costs, min(costs) * (1 + 1e-6)))
        for axes, name in zip(line, names, strict=True):
            spots = {
                tuple(own.index(x) for own, x in zip(values[name], pair, strict=True)): arm
                for pair, arm in zip(at[name], counted[name], strict=False)
            }
            _draw_heat(axes, values[name], spots, unit, scale)
            axes.set_title(f"{optimizer_label(name)}: {unit}", loc="left")
            axes.set_ylabel(plain(swept(run)[name][0]))
            axes.set_xlabel(plain(swept(run)[name][1]))
        bar = figure.colorbar(ScalarMappable(scale, HEAT_COLORS), ax=line, aspect=30)
        seeds = max((arm.n for own in arms.values() for arm in own), default=1)
        bar.set_label(f"{unit} to grok, " + ("median of the seeds" if seeds > 1 else "one seed"))
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(lambda value, _: _amount(value))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _units(run: Run, names: Sequence[str]) -> list[str]:
    """Returns epochs and the units in which the cost of an epoch depends on the setting."""
    rows = {name: run.of(None, name) for name in names}
    return ["epochs"] + [
        unit
        for unit in ("tokens", "steps", "FLOP")
        if any(known(n, unit) and apart([*map(UNITS[unit], own)]) for n, own in rows.items())
    ]


def _values(run: Run, arm: Arm) -> list[Value]:
    """Returns an arm's values of the two settings."""
    return [grid.values(arm.panel.point)[setting] for setting in swept(run)[arm.optimizer]]


def _draw_heat(
    axes: Axes,
    values: list[list[Value]],
    spots: Mapping[tuple[int, ...], Arm],
    unit: str,
    scale: LogNorm,
) -> None:
    colors = np.full([len(v) for v in values], np.nan)
    for i, j in np.ndindex(*colors.shape):
        text, color = "–", "k"
        if arm := spots.get((i, j)):
            median = arm.median(unit)
            text = median.text(_amount)
            if arm.censored:
                text += f"\n{arm.censored} censored"
            elif arm.n > 1:
                costs = [value(row, unit) for row in arm.cells]
                text += f"\n{_amount(min(costs))} to {_amount(max(costs))}"
            # A lower bound gets no colour. In steps, the budget of a large batch would look cheap.
            if not median.at_least:
                colors[i, j] = median.value
                color = "w" if scale(median.value) > 0.5 else "k"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axes.imshow(colors, cmap=HEAT_COLORS, norm=scale, aspect="auto")
    axes.set_facecolor("#dddddd")
    axes.grid(visible=False)
    axes.set_yticks(range(len(values[0])), [*map(_label, values[0])])
    axes.set_xticks(range(len(values[1])), [*map(_label, values[1])])


def _amount(cost: float) -> str:
    rounded = float(f"{cost:.3g}")
    return number(rounded) if cost < 10_000 else EngFormatter(sep="")(rounded)
