"""Report of the grokking study: reads a run's files, draws its figures, writes report.html.

It never trains, so it can be made again at any time: `python -m experiments.grok.report FOLDER`.
"""

import collections
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from experiments.commands import reporting
from experiments.figures import figure_style, optimizer_label
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
    Arm,
    Median,
    Row,
    Run,
    aggregate,
    load_run,
    sustained_median,
)
from experiments.grok.report_sweep_data import known
from experiments.pages import flop, number, save_figure, text_table, write_page


class Table(NamedTuple):
    """A table of the page."""

    columns: Sequence[str]
    lines: list[list[str]]


def bounded(median: Median, form: Callable[[float], str] = number) -> str:
    """A median as text, "> 200" where it is only a lower bound."""
    return f"> {form(median.value)}" if median.at_least else form(median.value)


def compute(arm: Arm) -> str:
    """FLOPs to grok, "–" where XLA does not count all that the optimizer does."""
    return bounded(arm.flops_to_grok, flop) if known(arm.optimizer, "FLOP") else "–"


# The per-arm table: heading in the report, heading in the terminal, the text for an arm.
ARM_COLUMNS: tuple[tuple[str, str, Callable[[Arm], str]], ...] = (
    ("task", "task", lambda arm: arm.panel.task),
    ("softmax", "softmax", lambda arm: arm.panel.softmax),
    ("optimizer", "opt.", lambda arm: optimizer_label(arm.optimizer)),
    ("n", "n", lambda arm: str(arm.n)),
    ("memorised (epoch)", "mem.", lambda arm: bounded(arm.memorized)),
    ("grok, first (epoch)", "grok", lambda arm: bounded(arm.grok_first)),
    ("grok, sustained (epoch)", "held", lambda arm: bounded(arm.grok_sustained)),
    ("grok, near best (epoch)", "best", lambda arm: bounded(arm.grok_near_best)),
    ("delay (epochs)", "delay", lambda arm: bounded(arm.delay)),
    ("censored", "cens.", lambda arm: f"{arm.censored} of {arm.n}"),
    ("time to grok (s)", "time\n(s)", lambda arm: bounded(arm.seconds_to_grok)),
    ("compute to grok", "compute", compute),
    ("steps/s", "steps\n/s", lambda arm: bounded(arm.steps_per_second)),
)
LOST_COLUMN = ("lost again", "lost", lambda arm: f"{arm.collapsed} of {arm.n}")
STABILITY_COLUMN = (
    "below 95 % after that",
    "",
    lambda arm: "–" if arm.below_after_grok is None else f"{100 * arm.below_after_grok:.1f} %",
)
POINT_COLUMN = ("setting", "setting", lambda arm: arm.panel.point)
TERMINAL_CAPTION = (
    "Epochs: mem. memorised, grok first at 95 % then, held for 5 evaluations,\n"
    "best within 1 % of the run's highest. cens. censored; time and compute to\n"
    "grok; > only a lower bound is known."
)


def arm_columns(rows: Sequence[Row]) -> list[tuple[str, str, Callable[[Arm], str]]]:
    """The columns of the per-arm table; with what differs between cells or befell some of them."""
    columns = list(ARM_COLUMNS)
    if any(row["collapse_epoch"] for row in rows):
        columns.insert([heading for heading, *_ in columns].index("censored") + 1, LOST_COLUMN)
    return [*columns[:3], POINT_COLUMN, *columns[3:]] if any(r["point"] for r in rows) else columns


def terminal_table(rows: Sequence[Row], budget: int | None = None) -> TerminalTable:
    """The per-arm table for the terminal, with the numbers of the HTML table.

    Args:
        rows: The rows of summary.json.
        budget: The epoch budget; by default the most epochs that a cell ran.
    """
    one = [name for name in ("task", "softmax") if len({row[name] for row in rows}) == 1]
    title = " · ".join(["Medians per arm", *(rows[0][name] for name in one)])
    columns = [column for column in arm_columns(rows) if column[0] not in one]
    columns = [(*c[:2], _short_point) if c == POINT_COLUMN else c for c in columns]
    names = [heading for heading, *_ in columns].index("n")
    return text_table(title, columns, aggregate(rows, budget), TERMINAL_CAPTION, names=names)


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
        return f"No ratio {names}: no cell that both finished."
    over, under = (sustained_median([cells[name][key] for key in common], budget) for name in cells)
    if over.at_least and under.at_least:
        return f"No ratio {names}: both medians lie beyond the budget."
    bound = "at least " if over.at_least else "at most " if under.at_least else ""
    same = len(common) == len(cells[slow]) == len(cells[fast])
    cells_word = "cell" if len(common) == 1 else "cells"
    where = "" if same else f" (over the {len(common)} {cells_word} that both finished)"
    return f"The ratio of medians, {names}, is {bound}{over.value / under.value:.2g}{where}."


def by_panel(run: Run, slow: str, fast: str) -> str:
    """One sentence: in how many panels one median lies below the other; "" for one panel."""
    medians: dict[Panel, dict[str, Median]] = {}
    for arm in aggregate(run.rows, run.budget):
        medians.setdefault(arm.panel, {})[arm.optimizer] = arm.grok_sustained
    pairs = [(of[slow], of[fast]) for of in medians.values() if slow in of and fast in of]
    if len(pairs) < 2:
        return ""
    lower = sum(not f.at_least and f.value < s.value for s, f in pairs)
    unknown = sum(s.at_least and f.at_least for s, f in pairs)
    tail = f", and in {unknown} neither median is within the budget" if unknown else ""
    return (
        f"{optimizer_label(fast)} has the lower median in {lower} of {len(pairs)}"
        f" pairs of task and softmax{tail}."
    )


def abstract(run: Run) -> list[str]:
    """The result in plain sentences, every number computed from the run.

    Args:
        run: The run.
    """
    finished, begun = len(run.rows), len(run.cells)
    if not finished:
        return [f"No cell has finished yet: 0 of {run.total} cells, {begun} begun."]
    partial = finished < run.total
    sentences = [f"{finished} of {run.total} cells finished so far."] if partial else []
    if any(cell.point for cell in run.cells):
        return sentences + report_sweep.sentences(run)
    pooled = {
        arm.optimizer: arm
        for arm in aggregate([r | Panel("", "")._asdict() for r in run.rows], run.budget)
    }
    if report_figures.many_arms(run):
        return [s for s in [*sentences, *ranking(run, list(pooled.values())), *losses(run)] if s]
    # The baseline last, so that the sentence reads "Muon ...; AdamW ...".
    names = sorted(pooled, key=lambda name: name == report_tests.BASELINE)
    clauses: list[str] = []
    for name in names:
        arm = pooled[name]
        clause = f"in {arm.n - arm.censored} of {arm.n} cells"
        epochs = number(arm.grok_sustained.value)
        if arm.censored == arm.n:
            clause += f" within the budget of {run.budget} epochs"
        elif arm.grok_sustained.at_least:
            clause += f", so at a median beyond {epochs} epochs"
        else:
            clause += f", at a median of {epochs} epochs"
        verb = "" if clauses else "reached 95 % validation accuracy, and held it, "
        clauses.append(f"{optimizer_label(name)} {verb}{clause}")
    sentences.append("; ".join(clauses) + ".")
    slow = report_tests.BASELINE if report_tests.BASELINE in names else names[-1]
    for fast in names:
        if fast != slow:
            several = len(run.panels()) > 1 and slow == report_tests.BASELINE
            ratio = report_tests.sentence(run, fast) if several else ""
            ratio = ratio or compare(run.rows, slow, fast, run.budget)
            sentences += [ratio, by_panel(run, slow, fast)]
    times = (f"{optimizer_label(n)} {bounded(pooled[n].seconds_to_grok)} s" for n in names)
    sentences.append(f"Median training time to grok: {'; '.join(times)}.")
    return [sentence for sentence in [*sentences, *losses(run)] if sentence]


def ranking(run: Run, arms: Sequence[Arm]) -> list[str]:
    """Many optimizers in two sentences: by the epoch, and the fastest by the second."""

    def told(arm: Arm, median: Median) -> str:
        part = f" ({arm.n - arm.censored} of {arm.n} cells)" if arm.censored else ""
        return f"{optimizer_label(arm.optimizer)} {number(median.value)}{part}"

    known = [arm for arm in arms if not arm.grok_sustained.at_least]
    known.sort(key=lambda arm: arm.grok_sustained.value)
    beyond = [arm for arm in arms if arm.grok_sustained.at_least]
    epochs = "; ".join(told(arm, arm.grok_sustained) for arm in known)
    result = [f"{len(known)} of {len(arms)} optimizers grokked, at a median epoch of: {epochs}."]
    if beyond:
        names = "; ".join(optimizer_label(arm.optimizer) for arm in beyond)
        result.append(f"Not within the budget of {run.budget} epochs, by the median: {names}.")
    timed = sorted(known, key=lambda arm: arm.seconds_to_grok.value)
    first = [arm for arm in timed if arm in timed[:3] or arm.optimizer == report_tests.BASELINE]
    seconds = "; ".join(told(arm, arm.seconds_to_grok) for arm in first)
    return [*result, f"First by seconds of training: {seconds}."] if first else result


def losses(run: Run) -> list[str]:
    """How many cells diverged, and how many lost again what they had grokked, and whose."""
    result = []
    for key, verb in (("diverged", "diverged"), ("collapse_epoch", "lost it again")):
        found = collections.Counter(r["optimizer"] for r in run.rows if r[key])
        whose = ", ".join(f"{count} of {optimizer_label(name)}" for name, count in found.items())
        cells = "1 cell" if found.total() == 1 else f"{found.total()} cells"
        whose = f": {whose}" if len(run.optimizers()) > 1 else ""
        result += [f"{cells} {verb}{whose}."] if found else []
    return result


def write_report(folder: Path) -> Path:
    """Write the figures and report.html into a run's folder.

    Args:
        folder: The run's folder, as experiments.grok wrote it; the run may be unfinished.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: The folder, its config.json or its summary.json is missing.
        ValueError: A file is not what it should be; the message names the file and the line.
    """
    run = load_run(folder)
    swept = any(cell.point for cell in run.cells)
    as_paper = not swept and not report_figures.many_arms(run)
    drawn = {"grok_epochs": report_figures.epochs_figure}
    if run.traces:
        drawn["curves"] = report_figures.curves_figure
    if not report_figures.many_arms(run):
        drawn["survival"] = report_tests.survival_figure
    if swept:
        drawn |= report_sweep.figures(run)
    elif len(run.panels()) > 1 and run.rows:
        drawn["published"] = report_published.figure
    looks = report_probes.figures(run)
    with figure_style():
        inside = [
            {"title": str(look.panel), "caption": look.caption}
            | save_figure(look.figure, folder / f"{look.name}.png")
            for look in looks
        ]
        figures = {n: save_figure(draw(run), folder / f"{n}.png") for n, draw in drawn.items()}
    columns = arm_columns(run.rows)
    if run.config.get("full_length"):
        columns.append(STABILITY_COLUMN)
    return write_page(
        Path(__file__).parent / "report.html.jinja",
        folder / "report.html",
        study="Grokking study",
        command="experiments.grok.report",
        config=run.config,
        machine=run.machine,
        version=run.version,
        run=run,
        abstract=abstract(run),
        columns=[heading for heading, *_ in columns],
        arms=[[form(arm) for *_, form in columns] for arm in aggregate(run.rows, run.budget)],
        tests=Table(report_tests.COLUMNS, report_tests.tests(run)),
        criteria=Table(
            ("over", *report_tests.CRITERIA), [] if swept else report_tests.criteria(run)
        ),
        best=Table(report_sweep.BEST_COLUMNS, report_sweep.best_table(run) if swept else []),
        trends=Table(
            ("optimizer", "setting", *report_sweep.UNITS), report_sweep.trends(run) if swept else []
        ),
        as_paper=as_paper,
        published=Table(report_published.COLUMNS, report_published.table(run) if as_paper else []),
        welch=report_published.welch(run),
        figures=figures,
        inside=inside,
        censored=sum(row["censored"] for row in run.rows),
        collapsed=sum(row["collapse_epoch"] is not None for row in run.rows),
        begun=len(run.cells),
        in_rows=report_figures.in_rows(run),
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a grokking run again from its files; nothing is trained.

    Args:
        folder: The run's folder, e.g. runs/grok/NAME.
    """
    with reporting(folder):
        path = write_report(folder)
        run = load_run(folder)
        console = Console()
        console.print(terminal_table(run.rows, run.budget))
        console.print(Text(" ".join(abstract(run))))
        console.print(Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m experiments.grok.report")
