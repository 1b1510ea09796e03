"""The report of a sweep: what a setting does to grokking, and who leads at its best setting."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

from experiments.grok import grid
from experiments.grok import statistics as tests
from experiments.grok.config import Panel
from experiments.grok.report_data import (
    BASELINE,
    UNITS,
    Median,
    Row,
    Run,
    apart,
    cost,
    counts,
    known,
    median_cost,
    numeric,
    plain,
    swept,
    uncounted,
)
from experiments.grok.report_sweep_figures import heat_figure, lines_figure
from experiments.grok.report_tests import p_text
from experiments.report.figures import optimizer_label
from experiments.report.text import number

BEST_COLUMNS = (
    "unit", "optimizer", "settings tried", "best setting", "n", "cost to grok, sustained",
    "ratio to AdamW's best", "95 % interval",
)  # fmt: skip


class Best(NamedTuple):
    """An optimizer's setting with the lowest median cost on one axis, and that cost."""

    optimizer: str
    tried: int
    panel: Panel
    n: int
    median: Median
    ratio: tests.Ratio | None


def plain_point(point: str) -> str:
    """A point for readers, as "learning rate 0.01, weight decay 1"."""
    return ", ".join(f"{plain(k)} {v}" for k, _, v in (p.partition("=") for p in point.split()))


def axes_apart(run: Run) -> list[str]:
    """The units in which cells can rank otherwise than in epochs, and epochs."""
    costs = {
        unit: [of(row) for row in run.rows if known(row["optimizer"], unit)]
        for unit, of in UNITS.items()
    }
    return [unit for unit in UNITS if unit == "epochs" or apart(costs[unit])]


def best(run: Run, unit: str = "epochs") -> list[Best]:
    """Each optimizer whose cost is known at the best of its settings.

    A run of one task and output function.
    """
    chosen: dict[str, tuple[int, Panel, list[Row]]] = {}
    for name in run.optimizers():
        tried = [(panel, rows) for panel in run.panels() if (rows := run.of(panel, name))]
        if tried and known(name, unit):
            panel, rows = min(tried, key=lambda setting: _order(run, setting[1], unit))
            chosen[name] = len(tried), panel, rows
    baseline = chosen[BASELINE][2] if BASELINE in chosen else []
    return [
        Best(
            name,
            tried,
            panel,
            len(rows),
            median_cost(run, rows, unit),
            None if name == BASELINE else _ratio(run, baseline, rows, unit),
        )
        for name, (tried, panel, rows) in chosen.items()
    ]


def _order(run: Run, rows: Sequence[Row], unit: str) -> tuple[float, float]:
    """Where a setting ranks: a bound behind every median, and means break ties."""
    median = median_cost(run, rows, unit)
    mean = statistics.fmean(cost(run, row, unit) for row in rows)
    return math.inf if median.at_least else median.value, mean


def _ratio(run: Run, slow: Sequence[Row], fast: Sequence[Row], unit: str) -> tests.Ratio | None:
    """Of costs, paired by seed. Budgets differ from cell to cell, so each counts as its own."""
    pairs = [(a, b) for a in slow for b in fast if a["seed"] == b["seed"]]
    told = [(a, b) for a, b in pairs if not (a["censored"] and b["censored"])]
    over, under = ({pair[i]["seed"]: cost(run, pair[i], unit) for pair in told} for i in (0, 1))
    found = tests.ratio([(over, under)], math.inf)
    return found and found._replace(
        at_least=sum(a["censored"] for a, _ in told),
        at_most=sum(b["censored"] for _, b in told),
        untold=len(pairs) - len(told),
    )


def best_table(run: Run) -> list[list[str]]:
    """Rows of the table of best settings, in the order of `BEST_COLUMNS`."""
    names = [found.optimizer for found in best(run)]
    table = []
    for unit in axes_apart(run):
        texts = {found.optimizer: _texts(found) for found in best(run, unit)}
        nothing = ["–"] * (len(BEST_COLUMNS) - 2)
        table += [[unit, optimizer_label(name), *texts.get(name, nothing)] for name in names]
    return table


def _texts(found: Best) -> list[str]:
    ratio = interval = "–"
    if found.ratio is not None:
        ratio = str(found.ratio)
        if not math.isnan(found.ratio.low):
            interval = f"{found.ratio.low:.2f} to {found.ratio.high:.2f}"
    return [
        str(found.tried),
        plain_point(found.panel.point) or "the run's",
        str(found.n),
        found.median.text(lambda x: EngFormatter(places=1, sep="")(x).replace(".0", "")),
        ratio,
        interval,
    ]


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
    in steps over batches, its place is unknown, and its value of the setting is left out. Words
    have no order, and so no trend.
    """
    rows = [row for row in run.rows if row["optimizer"] == optimizer]
    rows = [row for row in rows if setting in grid.values(row["point"])]
    one_budget = not apart([UNITS[unit](row) for row in rows])
    at = [grid.values(row["point"])[setting] for row in rows]
    if not (known(optimizer, unit) and numeric(at)):
        return None
    out = {x for x, row in zip(at, rows, strict=True) if row["censored"] and not one_budget}
    unit = "epochs" if one_budget else unit  # so that what XLA folds breaks no ties
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


def sentences(run: Run) -> list[str]:
    """The sweep in plain sentences, every number computed from the run."""
    clauses = []
    for found in best(run):
        at = f" ({plain_point(found.panel.point)})" if found.panel.point else ""
        of = f", the best of {found.tried} settings" if found.tried > 1 else ""
        more = "beyond " if found.median.at_least else ""
        name = optimizer_label(found.optimizer)
        clauses.append(f"{name} {more}{number(found.median.value)}{of}{at}")
    result = [counts(run), f"Median sustained grokking epoch: {'; '.join(clauses)}."]
    ratios: dict[str, list[str]] = {}
    for unit in axes_apart(run):
        for found in best(run, unit):
            if (ratio := found.ratio) is not None:
                interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]"
                text = f"{ratio}{'' if math.isnan(ratio.low) else interval}"
                ratios.setdefault(found.optimizer, []).append(f"{text} in {unit}")
    for name, found_ratios in ratios.items():
        of = f"AdamW over {optimizer_label(name)}"
        result.append(f"Each at its best setting, {of}, 95 % interval: {'; '.join(found_ratios)}.")
    result += [text for text in (uncounted(run),) if text] + _edges(run)
    for setting in dict.fromkeys(s for settings in swept(run).values() for s in settings):
        directions: dict[str, list[str]] = {}
        for unit in UNITS if not _is_tuned(setting) else ():
            for name in run.optimizers():
                if (at := trend(run, name, setting, unit)) is not None:
                    over = f" over the {at.values} values without a censored training"
                    words = f"{_direction(at)}{over if at.left_out else ''}"
                    directions.setdefault(f"{optimizer_label(name)}'s {words}", []).append(unit)
        told = [f"{who} ({', '.join(units)})" for who, units in directions.items()]
        if told:
            result.append(f"Cost of grokking with larger {plain(setting)}: {'; '.join(told)}.")
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
            if not _is_tuned(setting) or len(values) < 2 or not numeric(values):
                continue
            tuned = True
            if value in (min(values), max(values)):
                word = "lowest" if value == min(values) else "highest"
                name = optimizer_label(found.optimizer)
                ends.append(f"{name}'s {plain(setting)} is the {word} tried")
    if ends:
        return [f"{'; '.join(ends)}, so a better one may lie beyond."]
    return ["No best setting is the lowest or highest of its grid."] if tuned else []


def _direction(trend: Trend) -> str:
    if trend.p >= 0.05:
        return "shows no trend"
    return "rises" if trend.rho > 0 else "falls"


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
