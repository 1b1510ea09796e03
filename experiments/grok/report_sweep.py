"""The report of a sweep: the effect of settings on grokking, and optimizers at their best ones."""

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
from experiments.report.names import optimizer_label
from experiments.report.page import Picture, Table
from experiments.report.text import number, p_text

BEST = (
    "The setting at which each optimizer has its lowest median cost of sustained grokking, for "
    "each unit of cost that ranks trainings differently. This favours optimizers that were tried "
    "at more settings. The interval covers variation over seeds only. “–” means that XLA does not "
    "count the optimizer's FLOPs."
)
TRENDS = (
    "Spearman's rank correlation between the setting and the cost of sustained grokking. If all "
    "trainings have the same budget, censored ones rank last. Otherwise, as for steps when the "
    "batch size varies, values with a censored training are excluded. Settings that are not "
    "numbers have no correlation."
)
SWEEP = (
    "Cost of sustained grokking against the setting. A point is a training that grokked, a line "
    "the median if it is known. An open triangle marks n trainings (×n) of an optimizer that had "
    "not grokked within {budget} epochs, at their median cost. FLOPs are counted by XLA; "
    "optimizers with decompositions or loops, which it does not count fully, are omitted (–). "
    "Seconds are those of the machine below."
)
HEAT = (
    "Median cost of sustained grokking over seeds. With several seeds, the second line is the "
    "range, or the number of trainings censored at {budget} epochs. Grey fields have only a lower "
    "bound (>) or no value (–)."
)
BEST_COLUMNS = (
    "unit", "optimizer", "settings tried", "best setting", "n", "memorised (epoch)",
    "delay (epochs)", "cost to grok, sustained", "ratio to AdamW's best [95 %]",
)  # fmt: skip


class Best(NamedTuple):
    """The setting of an optimizer with the lowest median cost in one unit, and that cost."""

    arm: Arm
    tried: int
    median: Median
    ratio: tests.Ratio | None


def plain_point(point: str) -> str:
    """Returns the display text of a point, such as "learning rate 0.01, weight decay 1"."""
    return ", ".join(f"{plain(k)} {v}" for k, _, v in (p.partition("=") for p in point.split()))


def axes_apart(run: Run) -> list[str]:
    """Returns epochs and the units in which cells may rank differently than in epochs."""

    def differ(unit: str) -> bool:
        return apart([UNITS[unit](row) for row in run.rows if known(row["optimizer"], unit)])

    return [unit for unit in UNITS if unit == "epochs" or differ(unit)]


def best(run: Run, unit: str = "epochs") -> list[Best]:
    """Returns each optimizer whose cost is known, at the best of its settings.

    The run must have only one task and output function.
    """

    def order(arm: Arm) -> tuple[float, float]:
        """Sorts by median, with bounds last and means to break ties."""
        median = arm.median(unit)
        mean = statistics.fmean(cost(run, row, unit) for row in arm.cells)
        return math.inf if median.at_least else median.value, mean

    names = [name for name in run.optimizers() if known(name, unit)]
    tried = {name: aggregate(run.of(None, name), run.budget) for name in names}
    chosen = {name: min(arms, key=order) for name, arms in tried.items()}
    base = chosen.pop(BASELINE, None)
    ratios = {name: base and _ratio(run, base.cells, x.cells, unit) for name, x in chosen.items()}
    chosen |= {BASELINE: base} if base else {}
    return [
        Best(chosen[name], len(tried[name]), chosen[name].median(unit), ratios.get(name))
        for name in names
    ]


def _ratio(run: Run, slow: Sequence[Row], fast: Sequence[Row], unit: str) -> tests.Ratio | None:
    """Returns the ratio of costs, paired by seed. A censored cell counts at its own budget."""
    pairs = [(a, b) for a in slow for b in fast if a["seed"] == b["seed"]]
    informative = [(a, b) for a, b in pairs if not (a["censored"] and b["censored"])]
    over, under = (
        {pair[i]["seed"]: cost(run, pair[i], unit) for pair in informative} for i in (0, 1)
    )
    found = tests.ratio([(over, under)], math.inf)
    return found and found._replace(
        at_least=sum(a["censored"] for a, _ in informative),
        at_most=sum(b["censored"] for _, b in informative),
        untold=len(pairs) - len(informative),
    )


def best_table(run: Run) -> list[list[str]]:
    """Returns the rows of the table of best settings, in the order of `BEST_COLUMNS`."""
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
        rho, p: The correlation and its p value.
        values: The number of values of the setting that are included.
        left_out: The number of excluded values, which have a censored cell.
    """

    rho: float
    p: float
    values: int
    left_out: int

    @property
    def direction(self) -> str:
        return "shows no trend" if self.p >= 0.05 else "rises" if self.rho > 0 else "falls"


def trend(run: Run, optimizer: str, setting: str, unit: str) -> Trend | None:
    """Returns the correlation of a setting with the cost to grok, or None if there is none.

    If all cells have the same budget, censored ones rank last. Otherwise, as for steps over batch
    sizes, the rank of a censored cell is unknown, and its value of the setting is excluded.
    Settings that are not numbers have no order and hence no trend.
    """
    rows = [row for row in run.rows if row["optimizer"] == optimizer]
    rows = [row for row in rows if setting in grid.values(row["point"])]
    one_budget = not apart([UNITS[unit](row) for row in rows])
    at = [grid.values(row["point"])[setting] for row in rows]
    if not (known(optimizer, unit) and numeric(at)):
        return None
    out = {x for x, row in zip(at, rows, strict=True) if row["censored"] and not one_budget}
    unit = "epochs" if one_budget else unit  # keeps ties that XLA's constant folding would break
    pairs = [(x, cost(run, row, unit)) for x, row in zip(at, rows, strict=True) if x not in out]
    values = {x for x, _ in pairs}
    if len(values) < 3 or len({y for _, y in pairs}) < 2:
        return None
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return Trend(float(found.statistic), float(found.pvalue), len(values), len(out))


def trends(run: Run) -> list[list[str]]:
    """Returns the rows of the table of trends: optimizer, setting, and the trend in each unit."""

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
    """Returns the results of a sweep in sentences whose numbers are computed from the run."""
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
        told = ", with 95 % interval" * any("[" in ratio for ratio in found_ratios)
        of = f"AdamW over {name}, each at its best setting{told}"
        result.append(f"Ratio of costs, {of}: {'; '.join(found_ratios)}.")
    result += [*filter(None, [uncounted(run)]), *_edges(run)]
    for setting in dict.fromkeys(s for settings in swept(run).values() for s in settings):
        directions: dict[str, list[str]] = {}
        for unit in UNITS if not _is_tuned(setting) else ():
            for name in run.optimizers():
                if (at := trend(run, name, setting, unit)) is not None:
                    over = f" over the {at.values} values without a censored training"
                    words = f"{at.direction}{over if at.left_out else ''}"
                    directions.setdefault(f"{optimizer_label(name)}'s {words}", []).append(unit)
        clauses = [f"{who} ({', '.join(units)})" for who, units in directions.items()]
        if clauses:
            result.append(f"Cost of grokking with larger {plain(setting)}: {'; '.join(clauses)}.")
    return result


def _is_tuned(setting: str) -> bool:
    """Returns whether a setting has a best value, as a learning rate has, instead of a trend."""
    return setting.startswith(("adamw.", "muon."))


def _edges(run: Run) -> list[str]:
    """Returns a sentence on tuned settings, such as rates, that are best at an end of the grid."""
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
        return [f"{'; '.join(ends)}, so that a value outside the grid may be better."]
    return ["No best setting is the lowest or highest of its grid."] if tuned else []


def pictures(run: Run) -> list[Picture]:
    """Returns a figure of lines if one setting is swept, and heat maps if an optimizer has two."""
    widths = {len(settings) for settings in swept(run).values()}
    named = {plain(s) for settings in swept(run).values() for s in settings}
    found = []
    if max(widths, default=0) == 1 and len(named) == 1:
        alt = "Cost to grok against the swept setting, with one panel for each unit."
        caption = SWEEP.format(budget=run.budget)
        found.append(Picture("sweep", lambda: lines_figure(run), caption, alt))
    if 2 in widths:
        alt = "Heat maps of the median cost to grok over two settings, one for each optimizer."
        found.append(Picture("heat", lambda: heat_figure(run), HEAT.format(budget=run.budget), alt))
    return found


def items(run: Run) -> list[object]:
    """Returns the tables and figures of a sweep, or nothing for another run."""
    if not run.is_sweep:
        return []
    found: list[object] = [BEST, Table.of_texts(BEST_COLUMNS, best_table(run), names=2)]
    if table := trends(run):
        found += [TRENDS, Table.of_texts(("optimizer", "setting", *UNITS), table, names=2)]
    return found + pictures(run)
