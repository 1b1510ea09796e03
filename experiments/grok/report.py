"""The report of the grokking study: figures, tests, sweeps, diagnostics, the published study."""

import collections
from collections.abc import Sequence
from pathlib import Path

from experiments.grok import (
    grid,
    report_figures,
    report_probes,
    report_published,
    report_sweep,
    report_tests,
)
from experiments.grok.report_data import (
    BASELINE,
    Arm,
    Median,
    Row,
    Run,
    aggregate,
    known,
    load_run,
    value,
)
from experiments.report.names import optimizer_label
from experiments.report.page import Column, Report, Section, Table
from experiments.report.text import flop, form, number, plural


def _median(heading: str, short: str, field: str) -> Column:
    return heading, short, lambda arm: arm.median(field).text()


def compute(arm: Arm) -> str:
    """Returns the FLOPs to grok; "–" if XLA does not count all FLOPs of the optimizer."""
    return arm.median("FLOP").text(flop) if known(arm.optimizer, "FLOP") else "–"


ARM_COLUMNS: tuple[Column, ...] = (
    ("task", "task", lambda arm: arm.panel.task),
    ("softmax", "softmax", lambda arm: arm.panel.softmax),
    ("optimizer", "opt.", lambda arm: arm.label),
    ("n", "n", lambda arm: str(arm.n)),
    _median("memorised (epoch)", "mem.", "memorized_epoch"),
    _median("delay (epochs)", "delay", "delay"),
    _median("grok, sustained (epoch)", "held", "grok_epoch_sustained"),
    _median("grok, first (epoch)", "", "grok_epoch"),
    _median("grok, near best (epoch)", "", "grok_epoch_near_best"),
    ("strict", "strict", lambda arm: f"{arm.strict} of {arm.n}"),
    ("censored", "cens.", lambda arm: f"{arm.censored} of {arm.n}"),
    _median("time to grok (s)", "time\n(s)", "seconds"),
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
    "mem.: memorised. held: 95 % for 5 evaluations in a row.\n"
    "delay: held − mem. strict: held ≥ 2 × mem. cens.: censored.\n"
    "time, compute: until held. >: lower bound."
)
ARMS = (
    "Medians over the n finished trainings of each optimizer. A censored training counts as later "
    "than every training that grokked. “>” marks a median for which only a lower bound is known."
)


def _outcome(row: Row) -> str:
    return "diverged" if row["diverged"] else "censored" if row["censored"] else "grokked"


CELL_COLUMNS: list[Column] = [
    (heading, "", text)
    for heading, text in {
        "task": lambda row: row["task"],
        "softmax": lambda row: row["softmax"],
        "optimizer": lambda row: optimizer_label(row["optimizer"]),
        "seed": lambda row: str(row["seed"]),
        "setting": lambda row: row["point"] or "–",
        "memorised (epoch)": lambda row: number(row["memorized_epoch"]),
        "first crossing (epoch)": lambda row: number(row["first_crossing_epoch"]),
        "grok, first (epoch)": lambda row: number(row["grok_epoch"]),
        "grok, sustained (epoch)": lambda row: number(row["grok_epoch_sustained"]),
        "grok, near best (epoch)": lambda row: number(row["grok_epoch_near_best"]),
        "lost again (epoch)": lambda row: number(row["collapse_epoch"]),
        "delay (epochs)": lambda row: number(value(row, "delay")),
        "outcome": _outcome,
        "epochs run": lambda row: number(row["epochs_run"]),
        "training time (s)": lambda row: number(row["seconds"]),
        "steps/s": lambda row: number(row["steps_per_second"]),
        "time to grok (s)": lambda row: number(value(row, "seconds")),
        "compute to grok": lambda row: flop(value(row, "FLOP")),
        "compute per step": lambda row: flop(row["step_flops"]),
        "parameters": lambda row: number(row["parameters"]),
    }.items()
]
CELLS = "One row per finished training. “–” means not reached or not measured."
DEFINITIONS = {
    "Memorised": "The first epoch after which training accuracy is at least 99 %, measured without "
    "dropout on a fixed sample of up to 1024 examples.",
    "First crossing": "The first epoch with a validation accuracy of at least 95 %, whether or not "
    "the training set is memorised.",
    "Grok, first": "The first epoch with a validation accuracy of at least 95 %, at or after the "
    "memorised epoch.",
    "Grok, sustained": "The first of five evaluations in a row with a validation accuracy of at "
    "least 95 %, at or after the memorised epoch. The abstract and the figures use this grokking "
    "epoch, since a single crossing may be a spike.",
    "Grok, near best": "The first epoch, at or after the memorised one, with a validation accuracy "
    "of at least 95 % and within 1 % of the training's highest (Essential AI).",
    "Delay": "The sustained grokking epoch minus the memorised epoch. A delay may be 0, so ratios "
    "are computed from delay + 1. They include only pairs in which both trainings grokked.",
    "Strict": "Trainings whose sustained grokking epoch is at least twice the memorised epoch.",
    "Lost again": "Trainings with five evaluations in a row below 95 % after sustained grokking: "
    "{collapsed} of {finished} finished trainings here{short}. If trainings run for all epochs, "
    "the fraction of evaluations below 95 % after grokking also includes shorter dips.",
    "Censored": "Trainings without a sustained grokking epoch within the budget of {budget} "
    "epochs. They rank last in a median, for which then only a lower bound may be known.",
    "Time and compute to grok": "Seconds per epoch, compilation excluded, and floating-point "
    "operations by XLA's cost model, times the sustained grokking epoch. Seconds can only be "
    "compared on one machine.",
}


def arm_columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns of the per-arm table. Some appear only if cells need them."""
    columns = list(ARM_COLUMNS)
    if any(row["collapse_epoch"] for row in rows):
        columns.insert([heading for heading, *_ in columns].index("censored") + 1, LOST_COLUMN)
    return [*columns[:3], POINT_COLUMN, *columns[3:]] if any(r["point"] for r in rows) else columns


def terminal_table(run: Run) -> Table:
    """Returns the per-arm table for the terminal, without columns in which all arms agree."""
    one = [name for name in ("task", "softmax") if len({row[name] for row in run.rows}) == 1]
    title = " · ".join(["Medians by optimizer", *(run.rows[0][name] for name in one)])
    columns = [column for column in arm_columns(run.rows) if column[0] not in one]
    columns = [(*c[:2], _short_point) if c == POINT_COLUMN else c for c in columns]
    names = [heading for heading, *_ in columns].index("n")
    return Table(columns, aggregate(run.rows, run.budget), title=title, note=NOTE, names=names)


def _short_point(arm: Arm) -> str:
    """Returns settings in short form, such as "lr 0.01", with one line for each."""
    short = {"learning-rate": "lr", "weight-decay": "wd"}
    settings = {key.split(".")[-1]: x for key, x in grid.values(arm.panel.point).items()}
    return "\n".join(f"{short.get(name, name)} {value}" for name, value in settings.items())


def abstract(run: Run) -> list[str]:
    """Returns the results in sentences whose numbers are computed from the run."""
    finished = len(run.rows)
    partial = [f"{finished} of {run.total} trainings finished so far."] * (finished < run.total)
    if run.is_sweep:
        return [*partial, *report_sweep.sentences(run), *spiked(run)]
    pooled = run.pooled()
    if report_figures.many_arms(run):
        ranks = [*report_tests.strictly(run), *ranking(run, pooled)]
        return [*partial, *ranks, *losses(run), *spiked(run)]
    # The baseline comes last, so that the sentence reads "Muon ...; AdamW ...".
    pooled.sort(key=lambda arm: arm.optimizer == BASELINE)
    reached = [f"{arm.label} {_reached(arm)}" for arm in pooled]
    verb = "reached 95 % validation accuracy, and held it,"
    reached[0] = f"{pooled[0].label} {verb} {_reached(pooled[0])}"
    times = (f"{arm.label} {arm.median('seconds').text()} s" for arm in pooled)
    return [
        *partial,
        f"{'; '.join(reached)}.",
        *report_tests.strictly(run),
        *report_tests.sentences(run),
        f"Median training time to grok: {'; '.join(times)}.",
        *losses(run),
        *spiked(run),
    ]


def _reached(arm: Arm) -> str:
    """Returns in how many trainings an optimizer grokked, and when."""
    count, epochs = f"in {arm.grokked} of {arm.n} trainings", number(arm.median().value)
    if arm.censored == arm.n:
        return f"{count} within the budget of {arm.budget} epochs"
    if arm.median().at_least:
        return f"{count}, so at a median beyond {epochs} epochs"
    return f"{count}, at a median of {epochs} epochs"


def ranking(run: Run, arms: Sequence[Arm]) -> list[str]:
    """Ranks many optimizers in sentences: by epochs, and the fastest ones in seconds."""

    def text(arm: Arm, median: Median) -> str:
        part = f" ({arm.grokked} of {arm.n} trainings)" if arm.censored else ""
        return f"{arm.label} {number(median.value)}{part}"

    known = [arm for arm in arms if not arm.median().at_least]
    known.sort(key=lambda arm: arm.median().value)
    beyond = [arm for arm in arms if arm.median().at_least]
    epochs = "; ".join(text(arm, arm.median()) for arm in known)
    result = [f"{len(known)} of {len(arms)} optimizers grokked, at a median epoch of: {epochs}."]
    if beyond:
        names = "; ".join(arm.label for arm in beyond)
        result.append(f"Not within the budget of {run.budget} epochs, by the median: {names}.")
    timed = sorted(known, key=lambda arm: arm.median("seconds").value)
    first = [arm for arm in timed if arm in timed[:3] or arm.optimizer == BASELINE]
    seconds = "; ".join(text(arm, arm.median("seconds")) for arm in first)
    return [*result, f"Fastest in seconds of training: {seconds}."] if first else result


def losses(run: Run) -> list[str]:
    """Returns sentences on the cells that diverged, and on those that lost their accuracy again."""
    result = []
    for key, verb in (("diverged", "diverged"), ("collapse_epoch", "lost it again")):
        found = collections.Counter(r["optimizer"] for r in run.rows if r[key])
        whose = ", ".join(f"{count} of {optimizer_label(name)}" for name, count in found.items())
        whose = f": {whose}" if len(run.optimizers()) > 1 else ""
        result += [f"{plural(found.total(), 'training')} {verb}{whose}."] if found else []
    return result


def spiked(run: Run) -> list[str]:
    """Returns a sentence on spikes of the gradient norm, where `--gradient-norms` counted them."""
    counts: dict[str, list[int]] = {}
    for row in run.rows:
        if "spikes" in row:
            counts.setdefault(optimizer_label(row["optimizer"]), []).append(row["spikes"])
    clauses = (f"{name} {', '.join(map(str, sorted(own)))}" for name, own in counts.items())
    told = "Steps at which the gradient norm is above three times the median of the 50 before"
    return [f"{told}, by training: {'; '.join(clauses)}."] if counts else []


def report(folder: Path) -> Report:
    """Returns the report of a run, which may be unfinished, or of its stored results."""
    run = load_run(folder)
    finished, whole = len(run.rows), run.config.get("full_length")
    facts = {
        "budget": run.budget,
        "finished": finished,
        "collapsed": sum(row["collapse_epoch"] is not None for row in run.rows),
        "short": "" if whole else ", although most trainings end soon after grokking",
    }
    columns = arm_columns(run.rows) + [STABILITY_COLUMN] * bool(whole)
    arms = Table(columns, aggregate(run.rows, run.budget), ARMS, names=3).known()
    delays = [report_tests.DELAY_TEXT, Table(report_tests.DELAYS, run.pooled())]
    cells = Table(CELL_COLUMNS, run.rows, CELLS, names=3).known()
    definitions = {term: text.format_map(facts) for term, text in DEFINITIONS.items()}
    return Report(
        "Grokking study",
        f"Run {folder.resolve().name} · {finished} of {run.total} trainings finished, one for each "
        "task, output function, optimizer and seed",
        abstract(run),
        terminal_table(run),
        [
            Section("delay", "Is it grokking?", delays),
            Section("sweep", "Each optimizer at its best", report_sweep.items(run)),
            Section("published", "Comparison with the paper", report_published.items(run)),
            Section("figures", "Figures", report_figures.pictures(run)),
            Section("tests", "Tests", report_tests.items(run)),
            Section("inside", "Diagnostics", report_probes.figures(run)),
            Section("arms", "Results by optimizer", [arms]),
            Section("criteria", "Definitions", [definitions]),
            Section("cells", "Every finished training", [cells]),
        ],
        run.config,
        run.machine,
        run.version,
    )
