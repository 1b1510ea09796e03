"""Figures of cells: accuracy against epoch, epochs to grok, and survival."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.grok import grid, statistics
from experiments.grok.config import Cell
from experiments.grok.report_data import BASELINE, FEW_OPTIMIZERS, Arm, Run, aggregate, plain
from experiments.grok.train import GROKKED_ACCURACY
from experiments.report.figures import (
    DASHES,
    GROKKED_MARK,
    MEMORISED_MARK,
    REFERENCE,
    Final,
    draw_series,
    finals_figure,
    grid_of,
    legend,
    legend_line,
    name_axes,
    new_figure,
    plain_log_axis,
)
from experiments.report.names import optimizer_color, optimizer_label
from experiments.report.page import Picture
from experiments.report.series import series

CURVES = (
    "Accuracy after each epoch: training solid, validation dashed. Thin lines are single seeds, "
    "thick lines the median over the epochs that all seeds reached. Marks show median epochs over "
    "finished trainings, if within the budget."
)
EPOCHS = (
    "Sustained grokking epoch of every finished training. A line spans an optimizer's range, a bar "
    "marks its median where that is known, and a cross the epoch at which a training had lost its "
    "accuracy again. {censored} at the budget of {budget} epochs."
)
SURVIVAL = (
    "Kaplan–Meier estimate of the fraction of trainings that have not reached sustained grokking "
    "by each epoch, over all tasks and output functions."
)


def many_arms(run: Run) -> bool:
    """Returns whether the run has more optimizers than can be distinguished in one panel."""
    return len(run.optimizers()) > FEW_OPTIMIZERS


def curves_figure(run: Run) -> Figure:
    """Draws accuracy against epoch, with one panel for each task, output function and setting.

    With many optimizers, each of them has panels of its own, in which it is beside the baseline.
    """
    everywhere, many, panels = run.optimizers(), many_arms(run), run.panels()
    views = [(panel.point.replace(" ", "\n") or str(panel), panel, everywhere) for panel in panels]
    if many:
        views = [
            (
                "\n".join([title] * (len(panels) > 1) + [optimizer_label(name)]),
                panel,
                [*dict.fromkeys((BASELINE, name))],
            )
            for title, panel, _ in views
            for name in everywhere
        ]
    kinds = len({panel.softmax for panel in panels})
    columns = min(len(views), kinds if 1 < kinds <= 4 and not many else 4)
    wide, high = (6.6, 3.6) if len(views) == 1 else (max(3.1, 6.6 / columns), 2.3)
    figure, places = grid_of(len(views), columns, wide, high, sharex=True, sharey=True)
    arms = {(arm.panel, arm.optimizer): arm for arm in aggregate(run.rows, run.budget)}
    for axes, (title, panel, shown) in zip(places, views, strict=True):
        axes.axhline(100 * GROKKED_ACCURACY, **REFERENCE)
        for name in shown:
            if arm := arms.get((panel, name)):
                _draw_accuracy(axes, run, arm)
        axes.set_ylim(-3, 105)
        axes.set_yticks(range(0, 101, 25))
        plain_log_axis(axes, "x")
        axes.set_title(title, loc="left")
    name_axes(places, "epoch (log scale)", "accuracy (%)")
    others = [
        legend_line("validation, median", lw=2, ls=DASHES),
        legend_line("training, median", lw=1.1, alpha=0.7),
        legend_line("one seed", lw=0.7, alpha=0.7),
        legend_line("95 %", "#444444", lw=1, ls=":"),
        legend_line("memorised", mfc="white", **MEMORISED_MARK),
        legend_line("grokked (sustained)", **GROKKED_MARK),
    ]
    named = [name for name in everywhere if name == BASELINE or not many]
    legend(figure, named, *others, columns=4 if columns < 4 else 8)
    return figure


def _draw_accuracy(axes: Axes, run: Run, arm: Arm) -> None:
    """Draws every training thin, the medians thick, and marks at memorised and grokking epochs."""
    own = [run.traces[Cell.of(row)] for row in arm.cells]
    color = {"color": optimizer_color(arm.optimizer)}
    for key, style in (
        ("train_accuracy", {"lw": 1.1, "alpha": 0.55}),
        ("validation_accuracy", {"lw": 2, "ls": DASHES}),
    ):
        trainings = [series(of, key, at="epoch") for of in own]
        draw_series(axes, trainings, color | style, scale=100, smooth=False, statistic=np.median)
    marks: list[tuple[str, float, dict[str, Any]]] = [
        ("memorized_epoch", 100, MEMORISED_MARK | {"mfc": "white"}),
        ("grok_epoch_sustained", 100 * GROKKED_ACCURACY, GROKKED_MARK),
    ]
    for field, height, mark in marks:
        if not (median := arm.median(field)).at_least:
            axes.plot(median.value, height, zorder=5, **color | mark)


def epochs_figure(run: Run) -> Figure:
    """Draws grokking epochs, with one row per arm and one panel per task and output function.

    For a sweep there is one row per setting and one panel per arm. Many optimizers are sorted, the
    fastest at the top.
    """
    panels: dict[str, list[Arm]] = {}
    for arm in aggregate(run.rows, run.budget):
        panels.setdefault(arm.label if run.is_sweep else str(arm.panel), []).append(arm)
    if many_arms(run):
        panels = {t: sorted(own, key=lambda arm: arm.median()[::-1]) for t, own in panels.items()}
    kinds = len({panel.softmax for panel in run.panels()})
    figure = finals_figure(
        {title: [_row(run, arm) for arm in own] for title, own in panels.items()},
        "grokking epoch (log scale)",
        (f"budget, {run.budget} epochs", run.budget),
        columns=kinds if len(panels) > kinds > 1 and not run.is_sweep else 1,
        middle="median",
        limit=run.budget,
        beyond="censored",
        log=True,
    )
    for axes, own in zip(figure.axes, panels.values(), strict=False):
        # In the title, since two names beside a panel of one row would be longer than it is high.
        if settings := grid.values(own[-1].panel.point):
            names = " and ".join(map(plain, settings))
            axes.set_title(f"{axes.get_title(loc='left')}, by {names}", loc="left")
    return figure


def _row(run: Run, arm: Arm) -> Final:
    """Returns an arm's line. In a sweep its label is the setting's values, such as "0.01, 1"."""
    values = ", ".join(p.rpartition("=")[2] for p in arm.panel.point.split()) or "the run's"
    epochs = [cell["grok_epoch_sustained"] or math.inf for cell in arm.cells]
    median = math.inf if arm.median().at_least else arm.median().value
    lost = [cell["collapse_epoch"] for cell in arm.cells if cell["collapse_epoch"]]
    label = values if run.is_sweep else arm.label
    return Final(label, optimizer_color(arm.optimizer), epochs, median, None, lost)


def survival_figure(run: Run) -> Figure:
    """Draws the fraction of cells that have not grokked against epoch, for each optimizer."""
    figure = new_figure(6.6, 3.6)
    axes = figure.subplots()
    handles = []
    for name in run.optimizers():
        cells = [row["grok_epoch_sustained"] for row in run.of(None, name)]
        color, label = optimizer_color(name), f"{optimizer_label(name)}, n = {len(cells)}"
        handles.append(legend_line(label, color, lw=4))
        times, shares = statistics.survival(cells, run.budget)
        axes.step(times, [100 * x for x in shares], where="post", color=color, lw=1.8)
    axes.set(xlim=(0, run.budget), ylim=(0, 102), xlabel="epoch", ylabel="not yet grokked (%)")
    legend(figure, (), *handles, columns=3)
    return figure


def pictures(run: Run) -> list[Picture]:
    """Returns the figures: curves if there is a log, epochs, and survival if few optimizers."""
    censored, finished = sum(row["censored"] for row in run.rows), len(run.rows)
    marked = f"The {censored} censored ones are open triangles"
    if censored < 2:
        marked = "The one censored one is an open triangle" if censored else "None is censored"
    found = [
        Picture(
            "curves",
            lambda: curves_figure(run),
            CURVES,
            "Training and validation accuracy against epoch, with one panel for each task and "
            "output function and one colour for each optimizer.",
        ),
        Picture(
            "grok_epochs",
            lambda: epochs_figure(run),
            EPOCHS.format(censored=marked, budget=run.budget),
            "The sustained grokking epoch of every training, by optimizer, task and output "
            f"function; {censored} of {finished} are censored.",
        ),
        Picture(
            "survival",
            lambda: survival_figure(run),
            SURVIVAL,
            "Fraction of trainings that have not grokked against epoch, one curve per optimizer.",
        ),
    ]
    return found[not run.traces : 2 if many_arms(run) else 3]
