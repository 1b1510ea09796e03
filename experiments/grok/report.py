"""Report of the grokking study: reads a run's files, draws its figures, writes report.html.

It never trains, so it can be made again at any time: `python -m experiments.grok.report FOLDER`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.figures import (
    CENSORED_MARK,
    DASHES,
    GROKKED_MARK,
    MEMORISED_MARK,
    POINT_MARK,
    Curve,
    Milestones,
    Sample,
    draw_boxes,
    draw_curves,
    figure_style,
    legend_line,
    new_figure,
    optimizer_color,
    optimizer_label,
)
from experiments.grok import report_tests
from experiments.grok.report_data import (
    Arm,
    Median,
    Row,
    Run,
    aggregate,
    load_run,
    sustained_median,
)
from experiments.pages import flop, number, save_figure, write_page

THRESHOLD = 0.95


def bounded(median: Median, form: Callable[[float], str] = number) -> str:
    """A median as text, "> 200" where it is only a lower bound."""
    return f"> {form(median.value)}" if median.at_least else form(median.value)


# The per-arm table: heading in the report, heading in the terminal, the text for an arm.
ARM_COLUMNS: tuple[tuple[str, str, Callable[[Arm], str]], ...] = (
    ("task", "task", lambda arm: arm.task),
    ("softmax", "softmax", lambda arm: arm.softmax),
    ("optimizer", "opt.", lambda arm: optimizer_label(arm.optimizer)),
    ("n", "n", lambda arm: str(arm.n)),
    ("memorised (epoch)", "mem.", lambda arm: bounded(arm.memorized)),
    ("grok, first (epoch)", "grok", lambda arm: bounded(arm.grok_first)),
    ("grok, sustained (epoch)", "held", lambda arm: bounded(arm.grok_sustained)),
    ("delay (epochs)", "delay", lambda arm: bounded(arm.delay)),
    ("censored", "cens.", lambda arm: f"{arm.censored} of {arm.n}"),
    ("time to grok (s)", "time\n(s)", lambda arm: bounded(arm.seconds_to_grok)),
    ("compute to grok", "compute", lambda arm: bounded(arm.flops_to_grok, flop)),
    ("steps/s", "steps\n/s", lambda arm: bounded(arm.steps_per_second)),
)
TERMINAL_CAPTION = (
    "Epochs: mem. memorised, grok first at 95 % then, held for 5 evaluations.\n"
    "cens. censored; time and compute to grok; > only a lower bound is known."
)


def terminal_table(rows: Sequence[Row], budget: int | None = None) -> Table:
    """The per-arm table for the terminal, with the numbers of the HTML table.

    Args:
        rows: The rows of summary.json.
        budget: The epoch budget; by default the most epochs that a cell ran.
    """
    table = Table(
        title="Medians per arm",
        caption=TERMINAL_CAPTION,
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for place, (_, heading, _) in enumerate(ARM_COLUMNS):
        table.add_column(heading, justify="left" if place < 3 else "right", vertical="bottom")
    for arm in aggregate(rows, budget):
        # Text, and not str, so that a name with brackets is not read as rich's markup.
        table.add_row(*(Text(form(arm)) for *_, form in ARM_COLUMNS))
    return table


def compare(rows: Sequence[Row], slow: str, fast: str, budget: int) -> str:
    """One sentence: the ratio of two optimizers' medians over the cells that both finished."""
    cells: dict[str, dict[tuple, Row]] = {name: {} for name in (slow, fast)}
    for row in rows:
        if row["optimizer"] in cells:
            cells[row["optimizer"]][row["task"], row["softmax"], row["seed"]] = row
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
    medians: dict[tuple[str, str], dict[str, Median]] = {}
    for arm in aggregate(run.rows, run.budget):
        medians.setdefault((arm.task, arm.softmax), {})[arm.optimizer] = arm.grok_sustained
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
    finished, begun = len(run.rows), len(run.traces)
    if not finished:
        return [f"No cell has finished yet: 0 of {run.total} cells, {begun} begun."]
    partial = finished < run.total
    sentences = [f"{finished} of {run.total} cells finished so far."] if partial else []
    pooled = {
        arm.optimizer: arm
        for arm in aggregate([r | {"task": "", "softmax": ""} for r in run.rows], run.budget)
    }
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
            sentences += [compare(run.rows, slow, fast, run.budget), by_panel(run, slow, fast)]
    times = (f"{optimizer_label(n)} {bounded(pooled[n].seconds_to_grok)} s" for n in names)
    sentences.append(f"Median training time to grok: {'; '.join(times)}.")
    if diverged := sum(row["diverged"] for row in run.rows):
        sentences.append(f"{diverged} {'cell' if diverged == 1 else 'cells'} diverged.")
    return [sentence for sentence in sentences if sentence]


def published_statistic(run: Run) -> list[tuple[str, int, int, float | None]]:
    """Per optimizer: cells that grokked by the first crossing, cells, and their mean epoch.

    Args:
        run: The run.
    """
    result = []
    for name in run.optimizers():
        rows = [row for row in run.rows if row["optimizer"] == name]
        epochs = [row["grok_epoch"] for row in rows if row["grok_epoch"] is not None]
        mean = statistics.fmean(epochs) if epochs else None
        result.append((optimizer_label(name), len(epochs), len(rows), mean))
    return result


def curves_figure(run: Run) -> Figure:
    """Accuracy against epoch, a panel per (task, softmax)."""
    panels = run.panels() or [("no cell", "begun")]
    kinds = len({softmax for _, softmax in panels})
    columns = min(len(panels), kinds if 1 < kinds <= 4 else 4)
    lines = math.ceil(len(panels) / columns)
    wide, high = (6.6, 3.6) if len(panels) == 1 else (max(3.1, 6.6 / columns), 2.3)
    figure = new_figure(wide * columns, high * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    arms = {(arm.task, arm.softmax, arm.optimizer): arm for arm in aggregate(run.rows, run.budget)}
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.remove()
            continue
        curves: dict[str, list[Curve]] = {}
        marks = {}
        for key, trace in run.traces.items():
            if key[:2] != panels[place]:
                continue
            columns_of = ("epoch", "train_accuracy", "validation_accuracy")
            curves.setdefault(key[2], []).append(
                Curve(*([r[c] for r in trace] for c in columns_of))
            )
            if arm := arms.get(key[:3]):
                medians = (arm.memorized, arm.grok_sustained)
                marks[key[2]] = Milestones(*(None if m.at_least else m.value for m in medians))
        draw_curves(axes, curves, marks, THRESHOLD)
        axes.set_title(" · ".join(panels[place]), loc="left")
        if place % columns == 0:
            axes.set_ylabel("accuracy (%)")
        if place + columns >= len(panels):
            # A panel with none below it, which sharex would leave without numbers.
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("epoch (log scale)")
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in run.optimizers()]
    handles += [
        legend_line("validation, median", lw=2, ls=DASHES),
        legend_line("training, median", lw=1.1, alpha=0.7),
        legend_line("one seed", lw=0.7, alpha=0.7),
        legend_line("95 %", "#444444", lw=1, ls=":"),
        legend_line("memorised", mfc="white", **MEMORISED_MARK),
        legend_line("grokked (sustained)", **GROKKED_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if columns < 4 else 8)
    return figure


def boxes_figure(run: Run) -> Figure:
    """The sustained grokking epoch of every cell: a row per softmax, a group of boxes per task."""
    kinds = list(dict.fromkeys(row["softmax"] for row in run.rows)) or ["no cell finished"]
    names = list(dict.fromkeys(row["optimizer"] for row in run.rows))
    tasks = list(dict.fromkeys(row["task"] for row in run.rows))
    epochs = [row["grok_epoch_sustained"] or run.budget for row in run.rows] or [1]
    width = max(4.2, 0.5 * len(tasks) * (len(names) + 0.8) + 1.2)
    figure = new_figure(width, 2.3 * len(kinds) + 1.1)
    for softmax, axes in zip(
        kinds, figure.subplots(len(kinds), squeeze=False, sharey=True).flat, strict=True
    ):
        groups = []
        for task in tasks:
            cells = [r for r in run.rows if (r["task"], r["softmax"]) == (task, softmax)]
            samples = [
                Sample(n, [c["grok_epoch_sustained"] for c in cells if c["optimizer"] == n])
                for n in names
            ]
            groups.append((task, samples))
        draw_boxes(axes, groups, run.budget, log=max(epochs) > 10 * min(epochs))
        axes.set_ylabel("grokking epoch")
        if len(kinds) > 1:
            axes.set_title(softmax, loc="left")
    censored = sum(row["censored"] for row in run.rows)
    handles = [legend_line(optimizer_label(n), optimizer_color(n), lw=4) for n in names]
    handles += [
        legend_line("one cell", **POINT_MARK),
        legend_line(f"{censored} censored", mfc="white", **CENSORED_MARK),
        legend_line(f"budget, {run.budget} epochs", "#444444", lw=1, ls=":"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if width < 6 else 6)
    return figure


def write_report(folder: Path) -> Path:
    """Write curves.png, grok_epochs.png, survival.png and report.html into a run's folder.

    Args:
        folder: The run's folder, as experiments.grok wrote it; the run may be unfinished.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is not what it should be; the message names the file and the line.
    """
    run = load_run(folder)
    with figure_style():
        figures = {
            name: save_figure(draw(run), folder / f"{name}.png")
            for name, draw in (
                ("curves", curves_figure),
                ("grok_epochs", boxes_figure),
                ("survival", report_tests.survival_figure),
            )
        }
    published = published_statistic(run)
    means = {name: mean for name, reached, n, mean in published if mean and reached == n}
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
        columns=[heading for heading, *_ in ARM_COLUMNS],
        arms=[[form(arm) for *_, form in ARM_COLUMNS] for arm in aggregate(run.rows, run.budget)],
        test_columns=report_tests.COLUMNS,
        tests=report_tests.tests(run),
        figures=figures,
        censored=sum(row["censored"] for row in run.rows),
        begun=len(run.traces),
        published=published,
        published_ratio=means["AdamW"] / means["Muon"] if {"AdamW", "Muon"} <= {*means} else None,
    )


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the report of a grokking run again from its files; nothing is trained.

    Args:
        folder: The run's folder, e.g. runs/grok/NAME.
    """
    try:
        path = write_report(folder)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    run = load_run(folder)
    console = Console()
    console.print(terminal_table(run.rows, run.budget))
    console.print(Text(" ".join(abstract(run))))
    console.print(Text(str(path)))


if __name__ == "__main__":
    tyro.cli(main)
