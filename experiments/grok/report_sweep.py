"""The report of a sweep: what a setting does to grokking, and who leads at its best setting."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import EngFormatter
from scipy import stats

from experiments.grok import grid, report_tests
from experiments.grok import statistics as tests
from experiments.grok.report_data import (
    BASELINE,
    UNITS,
    Arm,
    Median,
    Row,
    Run,
    aggregate,
    apart,
    cost,
    counts,
    known,
    numeric,
    plain,
    swept,
    uncounted,
)
from experiments.grok.report_sweep_figures import heat_figure, lines_figure
from experiments.report.figures import optimizer_label
from experiments.report.page import Picture, Table
from experiments.report.text import number, p_text

BEST = (
    "The setting at which each optimizer has its lowest median cost of sustained grokking, for "
    "each unit of cost that ranks trainings differently. It favours optimizers that were tried at "
    "more settings; the interval covers seeds only. “–”: XLA does not count the optimizer's FLOPs."
)
TRENDS = (
    "Spearman's rank correlation between the setting and the cost of sustained grokking. If all "
    "trainings have the same budget, censored ones rank last; if not, as in steps when the batch "
    "varies, values with a censored training are excluded. Words have no order and no correlation."
)
SWEEP = (
    "Cost of sustained grokking against the setting: a point is a training that grokked, a line "
    "the median where it is known, an open triangle the n trainings (×n) of an optimizer that had "
    "not grokked within {budget} epochs, at the median cost of these. FLOPs are counted by XLA, "
    "which omits decompositions and repetitions of loops (–). Seconds are this machine's."
)
HEAT = (
    "Median cost of sustained grokking over seeds and, of several, the range, or the number of "
    "trainings censored at {budget} epochs. Grey: only a lower bound is known (>), or nothing (–)."
)
BEST_COLUMNS = (
    "unit", "optimizer", "settings tried", "best setting", "n", "memorised (epoch)",
    "delay (epochs)", "cost to grok, sustained", "ratio to AdamW's best [95 %]",
)  # fmt: skip


class Best(NamedTuple):
    """An optimizer's setting with the lowest median cost on one axis, and that cost."""

    arm: Arm
    tried: int
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
    arms: dict[str, list[Arm]] = {name: [] for name in run.optimizers()}
    for arm in aggregate(run.rows, run.budget):
        arms[arm.optimizer] += [arm] if known(arm.optimizer, unit) else []

    def order(arm: Arm) -> tuple[float, float]:
        """A bound behind every median, and means break ties."""
        median = arm.median(unit)
        mean = statistics.fmean(cost(run, row, unit) for row in arm.cells)
        return math.inf if median.at_least else median.value, mean

    chosen = {name: min(tried, key=order) for name, tried in arms.items() if tried}
    base = chosen.get(BASELINE)
    return [
        Best(
            arm,
            len(arms[name]),
            arm.median(unit),
            _ratio(run, base.cells, arm.cells, unit) if base and name != BASELINE else None,
        )
        for name, arm in chosen.items()
    ]


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
    names = [found.arm.optimizer for found in best(run)]
    table = []
    for unit in axes_apart(run):
        texts = {found.arm.optimizer: _texts(found) for found in best(run, unit)}
        nothing = ["–"] * (len(BEST_COLUMNS) - 2)
        table += [[unit, optimizer_label(name), *texts.get(name, nothing)] for name in names]
    return table


def _texts(found: Best) -> list[str]:
    arm = found.arm
    return [
        str(found.tried),
        plain_point(arm.panel.point) or "the run's",
        str(arm.n),
        *(arm.median(of).text() for of in ("memorized_epoch", "delay")),
        found.median.text(lambda x: EngFormatter(places=1, sep="")(x).replace(".0", "")),
        found.ratio.text if found.ratio else "–",
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
        point = found.arm.panel.point
        at = f" ({plain_point(point)})" if point else ""
        of = f", the best of {found.tried} settings" if found.tried > 1 else ""
        more = "beyond " if found.median.at_least else ""
        clauses.append(f"{found.arm.label} {more}{number(found.median.value)}{of}{at}")
    result = [counts(run), *report_tests.strictly(run)]
    result.append(f"Median sustained grokking epoch: {'; '.join(clauses)}.")
    ratios: dict[str, list[str]] = {}
    for unit in axes_apart(run):
        for found in best(run, unit):
            if (ratio := found.ratio) is not None:
                ratios.setdefault(found.arm.label, []).append(f"{ratio.text} in {unit}")
    for name, found_ratios in ratios.items():
        of = f"AdamW over {name}"
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
        arm = found.arm
        tried = [grid.values(c.point) for c in run.cells if c.optimizer == arm.optimizer]
        for setting, value in grid.values(arm.panel.point).items():
            values = {point[setting] for point in tried if setting in point}
            if not _is_tuned(setting) or len(values) < 2 or not numeric(values):
                continue
            tuned = True
            if value in (min(values), max(values)):
                word = "lowest" if value == min(values) else "highest"
                ends.append(f"{arm.label}'s {plain(setting)} is the {word} tried")
    if ends:
        return [f"{'; '.join(ends)}, so a better one may lie beyond."]
    return ["No best setting is the lowest or highest of its grid."] if tuned else []


def _direction(trend: Trend) -> str:
    if trend.p >= 0.05:
        return "shows no trend"
    return "rises" if trend.rho > 0 else "falls"


def pictures(run: Run) -> list[Picture]:
    """Lines over the one setting that is swept; heat maps where an optimizer has two."""
    widths = {len(settings) for settings in swept(run).values()}
    named = {plain(s) for settings in swept(run).values() for s in settings}
    found = []
    if run.rows and max(widths, default=0) == 1 and len(named) == 1:
        alt = "Cost to grok against the swept setting, a panel for each unit."
        caption = SWEEP.format(budget=run.budget)
        found.append(Picture("sweep", lambda: lines_figure(run), caption, alt))
    if run.rows and 2 in widths:
        alt = "Heat maps of the median cost to grok over two settings, one for each optimizer."
        found.append(Picture("heat", lambda: heat_figure(run), HEAT.format(budget=run.budget), alt))
    return found


def items(run: Run) -> list[object]:
    """Tables and figures of a sweep; nothing of another run."""
    if not run.is_sweep or not (best := best_table(run)):
        return []
    found: list[object] = [BEST, Table.of_texts(BEST_COLUMNS, best, names=2)]
    if table := trends(run):
        found += [TRENDS, Table.of_texts(("optimizer", "setting", *UNITS), table, names=2)]
    return found + pictures(run)
