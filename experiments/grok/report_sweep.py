"""The report of a sweep: what a setting does to grokking, and who leads at its best setting.

Tokens, steps, FLOPs and seconds are the sustained grokking epoch times what an epoch takes; in
medians and figures a censored cell counts at its budget.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from scipy import stats

from experiments.figures import (
    CENSORED_MARK,
    POINT_MARK,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
)
from experiments.grok import grid
from experiments.grok import statistics as tests
from experiments.grok.config import Panel
from experiments.grok.report_data import Median, Row, Run, sustained_median
from experiments.grok.report_tests import BASELINE, p_text
from experiments.pages import number

# What an epoch of a cell takes, in the units of each axis.
UNITS: dict[str, Callable[[Row], float]] = {
    "epochs": lambda row: 1.0,
    "tokens": lambda row: row["tokens_per_epoch"],
    "steps": lambda row: row["steps_per_epoch"],
    "FLOP": lambda row: row["steps_per_epoch"] * row["step_flops"],
    "seconds": lambda row: row["steps_per_epoch"] / row["steps_per_second"],
}

BEST_COLUMNS = (
    "on the axis of", "optimizer", "settings tried", "best setting", "n", "to grok, sustained",
    "ratio, AdamW's best over it", "95 % interval",
)  # fmt: skip


class Best(NamedTuple):
    """An optimizer's setting with the lowest median cost on one axis, and that cost."""

    optimizer: str
    tried: int
    panel: Panel
    n: int
    median: Median
    ratio: tests.Ratio | None


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


def plain_point(point: str) -> str:
    """A point for readers, as "learning rate 0.01, weight decay 1"."""
    return ", ".join(f"{plain(k)} {v}" for k, _, v in (p.partition("=") for p in point.split()))


def axes_apart(run: Run) -> list[str]:
    """The units in which cells can rank otherwise than in epochs, and epochs."""
    costs = {unit: {of(row) for row in run.rows} for unit, of in UNITS.items()}
    return [unit for unit in UNITS if unit == "epochs" or len(costs[unit]) > 1]


def best(run: Run, unit: str = "epochs") -> list[Best]:
    """Each optimizer at the best of its settings; a run of one task and output function."""
    found: dict[str, tuple[float, float, Panel, float]] = {}
    tried: dict[str, int] = {}
    for name in run.optimizers():
        for panel in run.panels():
            if not (rows := run.of(panel, name)):
                continue
            tried[name] = tried.get(name, 0) + 1
            of_epoch = statistics.median(map(UNITS[unit], rows))
            median = sustained_median(rows, run.budget)
            # A bound ranks behind every median; means break ties.
            mean = statistics.fmean(row["grok_epoch_sustained"] or run.budget for row in rows)
            value = math.inf if median.at_least else median.value * of_epoch
            key = (value, mean * of_epoch, panel, of_epoch)
            found[name] = min(found.get(name, key), key)
    result = []
    for name, (*_, panel, of_epoch) in found.items():
        rows, ratio = run.of(panel, name), None
        if BASELINE in found and name != BASELINE:
            *_, slowest, of_slow_epoch = found[BASELINE]
            pair = [
                {row["seed"]: row["grok_epoch_sustained"] for row in of}
                for of in (run.of(slowest, BASELINE), rows)
            ]
            ratio = tests.ratio([(pair[0], pair[1])], run.budget)
            if ratio is not None:
                ratio = ratio.times(of_slow_epoch / of_epoch)
        epochs = sustained_median(rows, run.budget)
        median = Median(epochs.value * of_epoch, epochs.at_least)
        result.append(Best(name, tried[name], panel, len(rows), median, ratio))
    return result


def best_table(run: Run) -> list[list[str]]:
    """Rows of the table of best settings, in the order of `BEST_COLUMNS`."""
    table = []
    for unit in axes_apart(run):
        for found in best(run, unit):
            ratio = interval = "–"
            if found.ratio is not None:
                ratio = f"{found.ratio.value:.2f}{' (bound)' if found.ratio.bounded else ''}"
                if not math.isnan(found.ratio.low):
                    interval = f"{found.ratio.low:.2f} to {found.ratio.high:.2f}"
            table.append(
                [
                    unit,
                    optimizer_label(found.optimizer),
                    str(found.tried),
                    plain_point(found.panel.point) or "the run's",
                    str(found.n),
                    f"> {_amount(found)}" if found.median.at_least else _amount(found),
                    ratio,
                    interval,
                ]
            )
    return table


def _amount(found: Best) -> str:
    return EngFormatter(places=1, sep="")(found.median.value).replace(".0", "")


class Trend(NamedTuple):
    """Spearman's rank correlation of a setting with the cost to grok.

    Attributes:
        rho, p: of it.
        values: of the setting, that it is over.
        left_out: other values, with a censored cell.
    """

    rho: float
    p: float
    values: int
    left_out: int


def trend(run: Run, optimizer: str, setting: str, unit: str) -> Trend | None:
    """How a setting goes with the cost to grok.

    Where all cells have one budget, a censored one ranks behind all others. Where they have not, as
    in steps over batches, its place is unknown, and its value of the setting is left out.
    """
    rows = [row for row in run.rows if row["optimizer"] == optimizer]
    rows = [row for row in rows if setting in grid.values(row["point"])]
    one_budget = len({UNITS[unit](row) for row in rows}) == 1
    at = [grid.values(row["point"])[setting] for row in rows]
    out = {x for x, row in zip(at, rows, strict=True) if row["censored"] and not one_budget}
    pairs = [(x, cost(run, row, unit)) for x, row in zip(at, rows, strict=True) if x not in out]
    values = {x for x, _ in pairs}
    if len(values) < 3 or len({y for _, y in pairs}) < 2:
        return None
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return Trend(float(found.statistic), float(found.pvalue), len(values), len(out))


def trends(run: Run) -> list[list[str]]:
    """Rows of the table of trends: optimizer, setting, and a cell for each unit."""

    def text(found: Trend | None) -> str:
        if found is None:
            return "–"
        out = f", over {found.values} values" if found.left_out else ""
        return f"{found.rho:+.2f} (p {p_text(found.p)}{out})"

    table = []
    for name, settings in swept(run).items():
        for setting in settings:
            found = [trend(run, name, setting, unit) for unit in UNITS]
            if any(found):
                table.append([optimizer_label(name), plain(setting), *map(text, found)])
    return table


def cost(run: Run, row: Row, unit: str) -> float:
    """What a cell took to its sustained grokking epoch, or to its budget."""
    return (row["grok_epoch_sustained"] or run.budget) * UNITS[unit](row)


def sentences(run: Run) -> list[str]:
    """The sweep in plain sentences, every number computed from the run."""
    clauses = []
    for found in best(run):
        at = f" ({plain_point(found.panel.point)})" if found.panel.point else ""
        of = f", the best of {found.tried} settings" if found.tried > 1 else ""
        more = "beyond " if found.median.at_least else ""
        name = optimizer_label(found.optimizer)
        clauses.append(f"{name} {more}{number(found.median.value)}{of}{at}")
    result = [f"Median sustained grokking epoch: {'; '.join(clauses)}."]
    ratios: dict[str, list[str]] = {}
    for unit in axes_apart(run):
        for found in best(run, unit):
            if (ratio := found.ratio) is not None:
                interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]"
                text = f"{ratio.value:.2f}{'' if math.isnan(ratio.low) else interval}"
                bound = ", a bound" if ratio.bounded else ""
                ratios.setdefault(found.optimizer, []).append(f"{text} in {unit}{bound}")
    for name, found_ratios in ratios.items():
        of = f"AdamW over {optimizer_label(name)}"
        result.append(f"Each at its best, {of}, 95 % interval: {'; '.join(found_ratios)}.")
    result += _edges(run)
    for setting in dict.fromkeys(s for settings in swept(run).values() for s in settings):
        directions: dict[str, list[str]] = {}
        for unit in UNITS if not _is_tuned(setting) else ():
            for name in run.optimizers():
                if (at := trend(run, name, setting, unit)) is not None:
                    over = f" over the {at.values} values without a censored cell"
                    words = f"{_direction(at)}{over if at.left_out else ''}"
                    directions.setdefault(f"{optimizer_label(name)}'s {words}", []).append(unit)
        told = [f"{who} ({', '.join(units)})" for who, units in directions.items()]
        if told:
            result.append(f"With larger {plain(setting)}, what grokking takes: {'; '.join(told)}.")
    return result


def _is_tuned(setting: str) -> bool:
    """Whether there is a best value to look for, as of a rate, and not a trend."""
    return setting.startswith(("adamw.", "muon."))


def _edges(run: Run) -> list[str]:
    """Which tuned settings, as rates and decays, are best at the end of their grid; a sentence."""
    tuned, ends = False, []
    for found in best(run):
        tried = [grid.values(c.point) for c in run.cells if c.optimizer == found.optimizer]
        for setting, value in grid.values(found.panel.point).items():
            values = {point[setting] for point in tried if setting in point}
            if not _is_tuned(setting) or len(values) < 2:
                continue
            tuned = True
            if value in (min(values), max(values)):
                word = "lowest" if value == min(values) else "highest"
                name = optimizer_label(found.optimizer)
                ends.append(f"{name}'s {plain(setting)} is the {word} tried")
    if ends:
        return [f"{'; '.join(ends)}: a better one may lie beyond."]
    return ["No best setting lies at an end of its grid."] if tuned else []


def _direction(trend: Trend) -> str:
    if trend.p >= 0.05:
        return "shows no trend"
    return "rises" if trend.rho > 0 else "falls"


def lines_figure(run: Run) -> Figure:
    """Cost to grok against the one setting that is swept, a panel for each unit."""
    (setting,) = {plain(s) for settings in swept(run).values() for s in settings}
    found = [value for cell in run.cells for value in grid.values(cell.point).values()]
    values = sorted({float(value) for value in found})
    figure = new_figure(8.4, 5.0)
    panels = figure.subplots(2, 3).flat
    for axes, unit in zip(panels, UNITS, strict=False):
        for name, own in swept(run).items():
            _draw_line(axes, run, name, own, unit)
        axes.set_title(unit, loc="left")
        axes.set_xlabel(setting)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{x:g}" for x in values], rotation=45 if len(values) > 5 else 0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[len(UNITS)].remove()
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in run.optimizers()]
    handles += [
        legend_line("median", lw=2),
        legend_line("one cell", **POINT_MARK),
        legend_line("censored, at its budget", mfc="white", **CENSORED_MARK),
    ]
    if not all(swept(run).values()):
        handles.append(legend_line("not swept, median", lw=1.4, ls="--"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw_line(axes: Axes, run: Run, name: str, own: Sequence[str], unit: str) -> None:
    color = optimizer_color(name)
    rows = [row for row in run.rows if row["optimizer"] == name]
    if not own:
        if rows:
            level = statistics.median(cost(run, row, unit) for row in rows)
            axes.axhline(level, color=color, lw=1.4, ls="--")
        return
    by_value: dict[float, list[Row]] = {}
    for row in rows:
        if row["point"]:
            by_value.setdefault(float(grid.values(row["point"])[own[0]]), []).append(row)
    values = sorted(by_value)
    names = run.optimizers()
    # Censored cells of two optimizers lie on one spot where their budgets cost the same.
    aside = 2 ** (0.2 * (names.index(name) - (len(names) - 1) / 2))
    # A line through bounds would show the budget's course, which falls in steps as batches grow.
    known = [x for x in values if not sustained_median(by_value[x], run.budget).at_least]
    middle = [statistics.median(cost(run, row, unit) for row in by_value[x]) for x in known]
    axes.plot(known, middle, color=color, lw=2)
    for x in values:
        for row in by_value[x]:
            style = CENSORED_MARK | {"mfc": "white"} if row["censored"] else POINT_MARK
            at = x * aside if row["censored"] else x
            axes.plot(at, cost(run, row, unit), color=color, zorder=4, clip_on=False, **style)


def heat_figure(run: Run) -> Figure:
    """The median cost to grok over two settings, a heat map for each optimizer and unit."""
    names = [name for name, settings in swept(run).items() if len(settings) == 2]
    units = ["tokens", "steps", "FLOP"] if "batch" in swept(run)[names[0]] else ["epochs"]
    figure = new_figure(4.2 * len(names), 3.4 * len(units))
    all_axes = figure.subplots(len(units), len(names), squeeze=False)
    for line, unit in zip(all_axes, units, strict=True):
        found = {name: _table(run, name, unit) for name in names}
        costs = np.concatenate([medians.reshape(-1) for _, medians, _ in found.values()])
        low, high = np.log(np.nanmin(costs)), np.log(np.nanmax(costs))
        for axes, (name, (values, medians, censored)) in zip(line, found.items(), strict=True):
            _draw_heat(axes, values, medians, censored, (low, max(high, low + 1e-6)))
            axes.set_title(f"{optimizer_label(name)}: {unit}", loc="left")
            axes.set_ylabel(plain(swept(run)[name][0]))
            axes.set_xlabel(plain(swept(run)[name][1]))
    return figure


def _table(run: Run, name: str, unit: str) -> tuple[list[list[float]], np.ndarray, np.ndarray]:
    """The values of two settings; medians over them, NaN where no cell is; censored counts."""
    first, second = swept(run)[name]
    cells: dict[tuple[float, float], list[Row]] = {}
    for row in run.rows:
        at = grid.values(row["point"])
        if row["optimizer"] == name and len(at) == 2:
            cells.setdefault((float(at[first]), float(at[second])), []).append(row)
    values = [sorted({key[place] for key in cells}) for place in (0, 1)]
    medians = np.full([len(v) for v in values], np.nan)
    censored = np.zeros(medians.shape, int)
    for (x, y), rows in cells.items():
        place = values[0].index(x), values[1].index(y)
        medians[place] = statistics.median(cost(run, row, unit) for row in rows)
        censored[place] = sum(row["censored"] for row in rows)
    return values, medians, censored


def _draw_heat(
    axes: Axes,
    values: list[list[float]],
    medians: np.ndarray,
    censored: np.ndarray,
    limits: tuple[float, float],
) -> None:
    low, high = limits
    axes.imshow(np.log(medians), cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
    axes.grid(visible=False)
    axes.set_yticks(range(len(values[0])), [f"{x:g}" for x in values[0]])
    axes.set_xticks(range(len(values[1])), [f"{x:g}" for x in values[1]])
    for (i, j), median in np.ndenumerate(medians):
        if math.isnan(median):
            continue
        dark = (math.log(median) - low) / (high - low) > 0.5
        text = number(float(f"{median:.3g}")) if median < 1e6 else f"{median:.2g}"
        text += f"\n{censored[i, j]} censored" if censored[i, j] else ""
        axes.text(j, i, text, ha="center", va="center", color="w" if dark else "k", fontsize=8)


def figures(run: Run) -> dict[str, Callable[[Run], Figure]]:
    """The figures that a run's axes allow, by their file's name."""
    widths = {len(settings) for settings in swept(run).values()}
    named = {plain(s) for settings in swept(run).values() for s in settings}
    drawn: dict[str, Callable[[Run], Figure]] = {}
    if run.rows and max(widths, default=0) == 1 and len(named) == 1:
        drawn["sweep"] = lines_figure
    if run.rows and 2 in widths:
        drawn["heat"] = heat_figure
    return drawn
