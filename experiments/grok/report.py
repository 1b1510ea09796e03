"""Report of the grokking study: figures, tests, sweeps, looks inside, the published study."""

import collections
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.grok import (
    grid,
    report_figures,
    report_probes,
    report_published,
    report_sweep,
    report_tests,
)
from experiments.grok.config import Cell, Panel
from experiments.grok.report_data import (
    BASELINE,
    Arm,
    Median,
    Row,
    Run,
    aggregate,
    known,
    load_run,
    sustained_median,
)
from experiments.report.figures import optimizer_label
from experiments.report.page import Column, Picture, Report, Section, Table
from experiments.report.text import flop, form, number, plural


def _epochs(heading: str, short: str, field: str) -> Column:
    return heading, short, lambda arm: arm.median(field).text()


def compute(arm: Arm) -> str:
    """FLOPs to grok, "–" where XLA does not count all that the optimizer does."""
    return arm.median("flops_to_grok").text(flop) if known(arm.optimizer, "FLOP") else "–"


ARM_COLUMNS: tuple[Column, ...] = (
    ("task", "task", lambda arm: arm.panel.task),
    ("softmax", "softmax", lambda arm: arm.panel.softmax),
    ("optimizer", "opt.", lambda arm: arm.label),
    ("n", "n", lambda arm: str(arm.n)),
    _epochs("memorised (epoch)", "mem.", "memorized_epoch"),
    _epochs("grok, first (epoch)", "grok", "grok_epoch"),
    _epochs("grok, sustained (epoch)", "held", "grok_epoch_sustained"),
    _epochs("grok, near best (epoch)", "best", "grok_epoch_near_best"),
    _epochs("delay (epochs)", "delay", "delay"),
    ("censored", "cens.", lambda arm: f"{arm.censored} of {arm.n}"),
    _epochs("time to grok (s)", "time\n(s)", "seconds_to_grok"),
    ("compute to grok", "compute", compute),
    ("steps/s", "steps\n/s", lambda arm: arm.steps_per_second.text()),
)
LOST_COLUMN: Column = ("lost again", "lost", lambda arm: f"{arm.collapsed} of {arm.n}")
STABILITY_COLUMN: Column = (
    "below 95 % after that",
    "",
    lambda arm: form(arm.below_after_grok, ".1%"),
)
POINT_COLUMN: Column = ("setting", "setting", lambda arm: arm.panel.point)
NOTE = (
    "Epochs: mem. memorised, grok first at 95 % then, held for 5 evaluations,\n"
    "best within 1 % of the run's highest. cens. censored; time and compute: to\n"
    "grok; > is a lower bound."
)
ARMS = (
    "Medians over the n finished trainings of each optimizer. A censored training counts as "
    "later than any that grokked; “>” marks a median of which only a lower bound is known."
)


def _number(heading: str, field: str) -> Column:
    return heading, heading, lambda row: number(row[field])


CELL_COLUMNS: tuple[Column, ...] = (
    ("task", "", lambda row: row["task"]),
    ("softmax", "", lambda row: row["softmax"]),
    ("optimizer", "", lambda row: optimizer_label(row["optimizer"])),
    ("seed", "", lambda row: str(row["seed"])),
    ("setting", "", lambda row: row["point"] or "–"),
    _number("memorised (epoch)", "memorized_epoch"),
    _number("first crossing (epoch)", "first_crossing_epoch"),
    _number("grok, first (epoch)", "grok_epoch"),
    _number("grok, sustained (epoch)", "grok_epoch_sustained"),
    _number("grok, near best (epoch)", "grok_epoch_near_best"),
    _number("lost again (epoch)", "collapse_epoch"),
    _number("delay (epochs)", "delay"),
    (
        "outcome",
        "",
        lambda row: "diverged" if row["diverged"] else "censored" if row["censored"] else "grokked",
    ),
    _number("epochs run", "epochs_run"),
    _number("training time (s)", "seconds"),
    _number("steps/s", "steps_per_second"),
    _number("time to grok (s)", "seconds_to_grok"),
    ("compute to grok", "", lambda row: flop(row["flops_to_grok"])),
    ("compute per step", "", lambda row: flop(row["step_flops"])),
    _number("parameters", "parameters"),
)
CELLS = "One row per finished training. “–”: not reached or not measured."
BEST = (
    "The setting at which each optimizer has its lowest median cost of sustained grokking, for "
    "each unit of cost that ranks trainings differently. The best of many settings favours "
    "optimizers that were tried at more of them; the interval covers seeds only, not the choice "
    "of the setting. “–”: XLA does not count the optimizer's FLOPs."
)
TRENDS = (
    "Spearman's rank correlation between the setting and the cost of sustained grokking, in "
    "five units: +1 if a larger value always costs more. If all trainings have the same budget, "
    "censored ones rank last; if not, as in steps when the batch varies, values with a censored "
    "training are excluded. Settings that are words have no order and no correlation."
)
SWEEP = (
    "Cost of sustained grokking against the setting. A point is a training that grokked, a line "
    "the median over seeds where it is known. An open triangle marks the n trainings (×n) of an "
    "optimizer at a setting that had not grokked within {budget} epochs, at the median cost of "
    "their budgets. FLOPs are counted by XLA, which omits decompositions and the repetitions of "
    "loops; optimizers with either have none (–). Seconds are this machine's."
)
HEAT = (
    "Median cost of sustained grokking over seeds, with the number of trainings censored at "
    "{budget} epochs. Grey: only a lower bound of the median is known (>), or nothing (–), such "
    "as FLOPs with decompositions. All optimizers share the colour scale of a unit."
)
PUBLISHED = (
    "“Muon Optimizer Accelerates Grokking” (Tveit et al., arXiv 2504.16041) reports a mean "
    "grokking epoch of 153.09 with AdamW and 102.89 with Muon, a ratio of 1.49, pooled over its "
    "tasks and output functions. The paper does not state its layers, width, learning rates, "
    "weight decay or seeds, so the ratio of this run is not a replication of that number unless "
    "the run covers the full grid, and even then its settings are this study's own. This run "
    "covers {tasks} ({named_tasks}) and {kinds} ({named_kinds})."
)
BOXES = (
    "Left: quartiles, medians and most extreme outliers, read off the paper's figure, and its "
    "means. Right: the first grokking epoch of every finished training of this run; censored "
    "ones are drawn at the budget of {budget} epochs."
)
SLIP = (
    "The paper gives t ≈ 5.0175 and p ≈ 6.33e-8. No two-sided p at that t is below 5.2e-7; with "
    "880 degrees of freedom it is 6.33e-7, so the exponent seems to be a typing error, and the "
    "study to have 882 trainings. {welch}Such a p value treats tasks and output functions as "
    "repetitions of one experiment and falls with the number of seeds, so it is not a target."
)
DOUBT = (
    "Later work questions how general the result is: Essential AI (“Muon Doesn't Clearly Grok "
    "Faster”, June 2025) finds the advantage under certain conditions and sees it disappear "
    "over a wider range of hyperparameters and model sizes."
)
CURVES = (
    "Accuracy after each epoch. Solid: training. Dashed: validation. Thin: one seed. Thick: the "
    "median over seeds, at the epochs that all of them reached. Dotted: 95 %. Open circles mark "
    "the median memorised epoch (at 100 %) and diamonds the median sustained grokking epoch (at "
    "95 %), over finished trainings; a median beyond the budget has no mark. {begun} trainings "
    "started, {finished} finished."
)
EPOCHS = (
    "Sustained grokking epoch of every finished training, one point each. The {censored} "
    "censored ones are open triangles at the budget of {budget} epochs, spread out so that they "
    "can be counted. {shape}"
)
ROWS = (
    "A line spans an optimizer's range, a bar marks its median where that is known, and a cross "
    "the epoch at which a training had lost its accuracy again."
)
QUARTILES = (
    "Boxes span the quartiles and whiskers the range, with censored trainings at the budget: a "
    "box that touches the dotted line is a lower bound. Points are spread horizontally for "
    "legibility only; the axis shows n."
)
SURVIVAL = (
    "Kaplan–Meier estimate of the share of trainings that have not reached sustained grokking "
    "by each epoch, over all tasks and output functions."
)
TESTS = (
    "Ratio: AdamW's sustained grokking epoch over each optimizer's, as the geometric mean over "
    "pairs of trainings with the same task, output function, setting and seed. In a row for one "
    "task and output function, an observation is a seed; in a row for several, it is the mean "
    "of one task and output function, since these are not repetitions of one experiment. "
    "Intervals are computed on logarithms: a percentile bootstrap for ten or more observations, "
    "Student's t for fewer, since resampling three seeds can only give their range. A censored "
    "training counts at the budget, which makes the ratio a lower bound (≥) if AdamW's is "
    "censored and an upper bound (≤) if the other's is; pairs with both censored are excluded. "
    "The Mann–Whitney test ranks censored trainings last, with Holm's correction over all its "
    "rows; three seeds against three are too few to distinguish, since p cannot be below 0.1. "
    "Wilcoxon's signed-rank test, with Holm's correction over the optimizers, has the mean of a "
    "task and output function as an observation. The log-rank test and Welch's t pool all "
    "trainings, as the published study does, Welch's t over first grokking epochs without the "
    "censored ones. They treat tasks as repetitions, and are shown only for comparison with "
    "that study."
)
CRITERIA = "The same ratio over all tasks and output functions, for other definitions of the epoch:"
DEFINITIONS = {
    "Memorised": "The first epoch after which training accuracy is at least 99 %, measured without "
    "dropout on a fixed sample of up to 1024 examples.",
    "First crossing": "The first epoch with a validation accuracy of at least 95 %, memorised or "
    "not.",
    "Grok, first": "The first epoch with a validation accuracy of at least 95 % at or after the "
    "memorised epoch.",
    "Grok, sustained": "The start of the first five evaluations in a row with a validation "
    "accuracy of at least 95 %, at or after the memorised epoch. The abstract and Figure 2 use "
    "this definition, since a single crossing may be a spike.",
    "Grok, near best": "The first epoch, at or after the memorised one, with a validation "
    "accuracy of at least 95 % and within 1 % of the training's highest (Essential AI). A "
    "training that ends once it has grokked reaches its highest within five evaluations.",
    "Lost again": "After sustained grokking, five evaluations in a row below 95 %: {collapsed} of "
    "{finished} finished trainings here{short}. Shorter dips do not count; they do in the "
    "share of evaluations below 95 % after that epoch, which is over the trainings that "
    "grokked, where these run to the end of the budget.",
    "Delay": "First grokking epoch minus memorised epoch.",
    "Censored": "No sustained grokking epoch within the budget of {budget} epochs. Such a training "
    "ranks last in a median. If the median is then unknown, the table shows the lower bound "
    "that follows from the budget.",
    "Time and compute to grok": "Training seconds, compilation excluded, and floating-point "
    "operations (of a step, by XLA's cost model, times the steps) until the first grokking "
    "epoch. Seconds can only be compared on one machine.",
}


def arm_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns of the per-arm table; with what differs between cells or befell some of them."""
    columns = list(ARM_COLUMNS)
    if any(row["collapse_epoch"] for row in rows):
        columns.insert([heading for heading, *_ in columns].index("censored") + 1, LOST_COLUMN)
    return [*columns[:3], POINT_COLUMN, *columns[3:]] if any(r["point"] for r in rows) else columns


def terminal_table(rows: Sequence[Row], budget: int | None = None) -> Table:
    """The per-arm table for the terminal, without what all arms have in common.

    Args:
        rows: The rows of summary.json.
        budget: The epoch budget; by default the most epochs that a cell ran.
    """
    one = [name for name in ("task", "softmax") if len({row[name] for row in rows}) == 1]
    title = " · ".join(["Medians by optimizer", *(rows[0][name] for name in one)])
    columns = [column for column in arm_columns(rows) if column[0] not in one]
    columns = [(*c[:2], _short_point) if c == POINT_COLUMN else c for c in columns]
    names = [heading for heading, *_ in columns].index("n")
    return Table(columns, aggregate(rows, budget), title=title, note=NOTE, names=names)


def _short_point(arm: Arm) -> str:
    """Settings where there is little room, as "lr 0.01", a line each."""
    short = {"learning-rate": "lr", "weight-decay": "wd"}
    settings = {key.split(".")[-1]: x for key, x in grid.values(arm.panel.point).items()}
    return "\n".join(f"{short.get(name, name)} {value}" for name, value in settings.items())


def compare(rows: Sequence[Row], slow: str, fast: str, budget: int) -> str:
    """One sentence: the ratio of two optimizers' medians over the cells that both finished."""
    cells: dict[str, dict[tuple, Row]] = {name: {} for name in (slow, fast)}
    for row in rows:
        if row["optimizer"] in cells:
            cell = Cell.of(row)
            cells[cell.optimizer][cell.panel, cell.seed] = row
    common = [key for key in cells[slow] if key in cells[fast]]
    names = f"{optimizer_label(slow)} over {optimizer_label(fast)}"
    if not common:
        return f"No ratio {names}: no training that both finished."
    over, under = (sustained_median([cells[name][key] for key in common], budget) for name in cells)
    if over.at_least and under.at_least:
        return f"No ratio {names}: both medians lie beyond the budget."
    bound = "at least " if over.at_least else "at most " if under.at_least else ""
    same = len(common) == len(cells[slow]) == len(cells[fast])
    where = "" if same else f" (over the {plural(len(common), 'training')} that both finished)"
    return f"The ratio of medians, {names}, is {bound}{over.value / under.value:.2g}{where}."


def by_panel(run: Run, slow: str, fast: str) -> str:
    """One sentence: in how many panels one median lies below the other; "" for one panel."""
    medians: dict[Panel, dict[str, Median]] = {}
    for arm in aggregate(run.rows, run.budget):
        medians.setdefault(arm.panel, {})[arm.optimizer] = arm.median()
    pairs = [(of[slow], of[fast]) for of in medians.values() if slow in of and fast in of]
    if len(pairs) < 2:
        return ""
    lower = sum(not f.at_least and f.value < s.value for s, f in pairs)
    unknown = sum(s.at_least and f.at_least for s, f in pairs)
    tail = f", and in {unknown} neither median is within the budget" if unknown else ""
    return (
        f"{optimizer_label(fast)} has the lower median in {lower} of {len(pairs)} pairs of task "
        f"and output function{tail}."
    )


def abstract(run: Run) -> list[str]:
    """The result in plain sentences, every number computed from the run.

    Args:
        run: The run.
    """
    finished, begun = len(run.rows), len(run.cells)
    if not finished:
        return [f"No training has finished yet: 0 of {run.total}, {begun} started."]
    partial = finished < run.total
    sentences = [f"{finished} of {run.total} trainings finished so far."] if partial else []
    if run.is_sweep:
        return sentences + report_sweep.sentences(run)
    pooled = {
        arm.optimizer: arm
        for arm in aggregate([r | Panel("", "")._asdict() for r in run.rows], run.budget)
    }
    if report_figures.many_arms(run):
        return [s for s in [*sentences, *ranking(run, list(pooled.values())), *losses(run)] if s]
    # The baseline last, so that the sentence reads "Muon ...; AdamW ...".
    names = sorted(pooled, key=lambda name: name == BASELINE)
    clauses: list[str] = []
    for name in names:
        arm = pooled[name]
        clause = f"in {arm.n - arm.censored} of {arm.n} trainings"
        epochs = number(arm.median().value)
        if arm.censored == arm.n:
            clause += f" within the budget of {run.budget} epochs"
        elif arm.median().at_least:
            clause += f", so at a median beyond {epochs} epochs"
        else:
            clause += f", at a median of {epochs} epochs"
        verb = "" if clauses else "reached 95 % validation accuracy, and held it, "
        clauses.append(f"{optimizer_label(name)} {verb}{clause}")
    sentences.append("; ".join(clauses) + ".")
    slow = BASELINE if BASELINE in names else names[-1]
    for fast in names:
        if fast != slow:
            several = len(run.panels()) > 1 and slow == BASELINE
            ratio = report_tests.sentence(run, fast) if several else ""
            ratio = ratio or compare(run.rows, slow, fast, run.budget)
            sentences += [ratio, by_panel(run, slow, fast)]
    seconds = {name: pooled[name].median("seconds_to_grok").text() for name in names}
    times = (f"{optimizer_label(name)} {text} s" for name, text in seconds.items())
    sentences.append(f"Median training time to grok: {'; '.join(times)}.")
    return [sentence for sentence in [*sentences, *losses(run)] if sentence]


def ranking(run: Run, arms: Sequence[Arm]) -> list[str]:
    """Many optimizers in two sentences: by the epoch, and the fastest by the second."""

    def told(arm: Arm, median: Median) -> str:
        part = f" ({arm.n - arm.censored} of {arm.n} trainings)" if arm.censored else ""
        return f"{arm.label} {number(median.value)}{part}"

    known = [arm for arm in arms if not arm.median().at_least]
    known.sort(key=lambda arm: arm.median().value)
    beyond = [arm for arm in arms if arm.median().at_least]
    epochs = "; ".join(told(arm, arm.median()) for arm in known)
    result = [f"{len(known)} of {len(arms)} optimizers grokked, at a median epoch of: {epochs}."]
    if beyond:
        names = "; ".join(arm.label for arm in beyond)
        result.append(f"Not within the budget of {run.budget} epochs, by the median: {names}.")
    timed = sorted(known, key=lambda arm: arm.median("seconds_to_grok").value)
    first = [arm for arm in timed if arm in timed[:3] or arm.optimizer == BASELINE]
    seconds = "; ".join(told(arm, arm.median("seconds_to_grok")) for arm in first)
    return [*result, f"Fastest in seconds of training: {seconds}."] if first else result


def losses(run: Run) -> list[str]:
    """How many cells diverged, and how many lost again what they had grokked, and whose."""
    result = []
    for key, verb in (("diverged", "diverged"), ("collapse_epoch", "lost it again")):
        found = collections.Counter(r["optimizer"] for r in run.rows if r[key])
        whose = ", ".join(f"{count} of {optimizer_label(name)}" for name, count in found.items())
        whose = f": {whose}" if len(run.optimizers()) > 1 else ""
        result += [f"{plural(found.total(), 'training')} {verb}{whose}."] if found else []
    return result


def report(folder: Path) -> Report:
    """A run, which may be unfinished, or its stored results."""
    run = load_run(folder)
    finished, tasks, kinds = len(run.rows), run.config["tasks"], run.config["softmax"]
    whole = run.config.get("full_length")
    facts = {
        "budget": run.budget,
        "begun": len(run.cells),
        "finished": finished,
        "censored": sum(row["censored"] for row in run.rows),
        "collapsed": sum(row["collapse_epoch"] is not None for row in run.rows),
        "short": "" if whole else ", though most end soon after grokking",
        "shape": ROWS if report_figures.in_rows(run) else QUARTILES,
        "welch": report_published.welch(run),
        "tasks": plural(len(tasks), "task"),
        "named_tasks": ", ".join(tasks),
        "kinds": plural(len(kinds), "output function"),
        "named_kinds": ", ".join(kinds),
    }
    columns = arm_columns(run.rows) + [STABILITY_COLUMN] * bool(whole)
    arms = Table(columns, aggregate(run.rows, run.budget), ARMS, names=3)
    cells = Table(CELL_COLUMNS, run.rows, CELLS, names=3)
    definitions = {term: text.format_map(facts) for term, text in DEFINITIONS.items()}
    return Report(
        "Grokking study",
        f"Run {folder.resolve().name} · {finished} of {run.total} trainings finished, each of a "
        "task, an output function, an optimizer and a seed",
        abstract(run),
        terminal_table(run.rows, run.budget) if run.rows else "",
        [
            Section("sweep", "Each optimizer at its best", _sweep(run, facts)),
            Section("published", "Comparison with the published study", _published(run, facts)),
            Section("figures", "Figures", _figures(run, facts)),
            Section("tests", "Tests", _tests(run)),
            Section("inside", "Diagnostics", report_probes.figures(run)),
            Section("arms", "Results by optimizer", [arms]),
            Section("criteria", "Definitions", [definitions]),
            Section("cells", "Every finished training", [cells]),
        ],
        run.config,
        run.machine,
        run.version,
    )


def _of_texts(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table.of_texts(columns, rows, names=3)


# By its file's name: the label, the caption, and what it shows in words.
PICTURES = {
    "sweep": (
        "Sweep",
        SWEEP,
        "Cost to grok against the swept setting, a panel for each unit.",
    ),
    "heat": (
        "Heat maps",
        HEAT,
        "Heat maps of the median cost to grok over two settings, one for each optimizer.",
    ),
    "published": (
        "Paper and run",
        BOXES,
        "Box plots of the grokking epoch: the paper's quartiles, and those of this run.",
    ),
    "curves": (
        "Figure 1",
        CURVES,
        "Training and validation accuracy against epoch, a panel for each task and output "
        "function, a colour for each optimizer.",
    ),
    "grok_epochs": (
        "Figure 2",
        EPOCHS,
        "The sustained grokking epoch of every training, by optimizer, task and output "
        "function; {censored} of {finished} are censored.",
    ),
    "survival": (
        "Figure 3",
        SURVIVAL,
        "Share of trainings that have not grokked against epoch, a curve for each optimizer.",
    ),
}


def _pictures(
    run: Run, facts: dict[str, object], drawn: dict[str, Callable[[Run], Figure]]
) -> list[Picture]:
    found = []
    for name, draw in drawn.items():
        label, caption, alt = PICTURES[name]
        texts = caption.format_map(facts), alt.format_map(facts), label
        found.append(Picture(name, functools.partial(draw, run), *texts))
    return found


def _sweep(run: Run, facts: dict[str, object]) -> list[object]:
    """Tables and figures of a sweep; nothing of another run."""
    if not run.is_sweep or not (best := report_sweep.best_table(run)):
        return []
    items: list[object] = [BEST, _of_texts(report_sweep.BEST_COLUMNS, best)]
    if trends := report_sweep.trends(run):
        headings = ("optimizer", "setting", *report_sweep.UNITS)
        items += [TRENDS, _of_texts(headings, trends)]
    return items + _pictures(run, facts, report_sweep.figures(run))


def _published(run: Run, facts: dict[str, object]) -> list[object]:
    """The paper beside the run, where this has its kind of grid."""
    if run.is_sweep or report_figures.many_arms(run):
        return []
    items: list[object] = [PUBLISHED.format_map(facts)]
    if rows := report_published.table(run):
        several = {"published": report_published.figure} if len(run.panels()) > 1 else {}
        items.append(_of_texts(report_published.COLUMNS, rows))
        items += [*_pictures(run, facts, several), SLIP.format_map(facts)]
    return [*items, DOUBT]


def _figures(run: Run, facts: dict[str, object]) -> list[Picture]:
    drawn = {"curves": report_figures.curves_figure} if run.traces else {}
    drawn["grok_epochs"] = report_figures.epochs_figure
    if not report_figures.many_arms(run):  # in whose colours survival curves would tell nothing
        drawn["survival"] = report_figures.survival_figure
    return _pictures(run, facts, drawn)


def _tests(run: Run) -> list[object]:
    rows = report_tests.tests(run)
    if not rows:
        return []
    items: list[object] = [TESTS, _of_texts(report_tests.COLUMNS, rows)]
    if not run.is_sweep and (criteria := report_tests.criteria(run)):
        items += [CRITERIA, _of_texts(("over", *report_tests.CRITERIA), criteria)]
    return items
