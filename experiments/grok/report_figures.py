"""The report's figures of cells: accuracy against epoch, and the epochs to grok."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.grok import grid, statistics
from experiments.grok.config import Panel
from experiments.grok.report_data import BASELINE, Arm, Run, aggregate, censored_median, plain
from experiments.grok.train import GROKKED_ACCURACY
from experiments.report.figures import (
    BEYOND,
    DASHES,
    GROKKED_MARK,
    MEAN_MARK,
    MEMORISED_MARK,
    POINT_MARK,
    REFERENCE,
    Final,
    draw_series,
    finals_figure,
    grid_of,
    legend,
    legend_line,
    name_axes,
    new_figure,
    optimizer_color,
    optimizer_label,
    plain_log_axis,
)
from experiments.report.page import Picture
from experiments.report.series import series

# More than these make a panel of curves, or a line of boxes, illegible.
FEW_OPTIMIZERS, FEW_SETTINGS = 6, 8
# Fewer than these have no quartiles worth a box.
FEW_VALUES = 5


CURVES = (
    "Accuracy after each epoch: training solid, validation dashed; one seed thin, the median at "
    "the epochs that all seeds reached thick. Marks are at the median epochs over finished "
    "trainings, unless beyond the budget. {begun} trainings started, {finished} finished."
)
EPOCHS = (
    "Sustained grokking epoch of every finished training. The {censored} censored ones are open "
    "triangles at the budget of {budget} epochs. {shape}"
)
ROWS = (
    "A line spans an optimizer's range, a bar marks its median where that is known, and a cross "
    "the epoch at which a training had lost its accuracy again."
)
QUARTILES = (
    "Five and more trainings have a box of their quartiles, with the censored ones at the budget, "
    "and whiskers to the ends of those that grokked; fewer have a line over their range and a bar "
    "at the median, if it is known. Points are spread horizontally for legibility only."
)
SURVIVAL = (
    "Kaplan–Meier estimate of the share of trainings that have not reached sustained grokking "
    "by each epoch, over all tasks and output functions."
)


class Sample(NamedTuple):
    """One box: an optimizer's values, None for a censored one."""

    optimizer: str
    values: list[float | None]


def many_arms(run: Run) -> bool:
    """Whether the run compares more optimizers than one panel can tell apart."""
    return len(run.optimizers()) > FEW_OPTIMIZERS


def curves_figure(run: Run) -> Figure:
    """Accuracy against epoch, a panel per task, softmax and setting.

    Where there are many optimizers, a panel for each of them, beside the baseline.
    """
    everywhere, many = run.optimizers(), many_arms(run)
    panels = run.panels() or [Panel("no cell", "begun")]
    views = [(_title(panel), panel, everywhere) for panel in panels]
    if many:
        views = [
            ("\n".join([title] * (len(panels) > 1) + [optimizer_label(name)]), panel,
             [*dict.fromkeys((BASELINE, name))])
            for title, panel, _ in views
            for name in everywhere
        ]  # fmt: skip
    kinds = len({panel.softmax for panel in panels})
    columns = min(len(views), kinds if 1 < kinds <= 4 and not many else 4)
    wide, high = (6.6, 3.6) if len(views) == 1 else (max(3.1, 6.6 / columns), 2.3)
    figure, places = grid_of(len(views), columns, wide, high, sharex=True, sharey=True)
    arms = {(arm.panel, arm.optimizer): arm for arm in aggregate(run.rows, run.budget)}
    for axes, (title, panel, shown) in zip(places, views, strict=True):
        axes.axhline(100 * GROKKED_ACCURACY, **REFERENCE)
        for name in shown:
            _draw_accuracy(axes, run, panel, name, arms.get((panel, name)))
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


def _draw_accuracy(axes: Axes, run: Run, panel: Panel, name: str, arm: Arm | None) -> None:
    """Every training thin, the medians emphasised, and where these memorise and grok."""
    own = [
        trace for cell, trace in run.traces.items() if (cell.panel, cell.optimizer) == (panel, name)
    ]
    color = {"color": optimizer_color(name)}
    medians = {"scale": 100, "smooth": False, "statistic": np.median}
    for key, style in (
        ("train_accuracy", {"lw": 1.1, "alpha": 0.55}),
        ("validation_accuracy", {"lw": 2, "ls": DASHES}),
    ):
        draw_series(axes, [series(of, key, at="epoch") for of in own], color | style, **medians)
    marks: list[tuple[str, float, dict[str, Any]]] = [
        ("memorized_epoch", 100, MEMORISED_MARK | {"mfc": "white"}),
        ("grok_epoch_sustained", 100 * GROKKED_ACCURACY, GROKKED_MARK),
    ]
    for field, height, mark in marks if arm and own else []:
        if not (median := arm.median(field)).at_least:
            axes.plot(median.value, height, zorder=5, **color | mark)


def _title(panel: Panel) -> str:
    return str(panel) if not panel.point else panel.point.replace(" ", "\n")


def in_rows(run: Run) -> bool:
    """Whether the arms are too many for boxes side by side, and have a row each."""
    return many_arms(run) or len({cell.point for cell in run.cells}) > FEW_SETTINGS


def epochs_figure(run: Run) -> Figure:
    """The sustained grokking epoch of every cell, as boxes or, where arms are many, as rows."""
    return _rows_figure(run) if in_rows(run) else _boxes_figure(run)


def _boxes_figure(run: Run) -> Figure:
    """A line of boxes per softmax, a group per task."""
    kinds = list(dict.fromkeys(row["softmax"] for row in run.rows)) or ["no cell finished"]
    names = run.optimizers()
    panels = [panel for panel in run.panels() if any(run.of(panel, name) for name in names)]
    swept = [panel.point for panel in panels if panel.point]
    epochs = [row["grok_epoch_sustained"] or run.budget for row in run.rows] or [1]
    boxes = len({(row["task"], row["point"], row["optimizer"]) for row in run.rows})
    width = max(4.2, 0.5 * (boxes / len(kinds) + 0.8 * len(panels)) + 1.2)
    figure, grid_ = grid_of(len(kinds), 1, width, 2.4, sharey=True)
    for softmax, axes in zip(kinds, grid_, strict=True):
        groups = []
        for panel in (panel for panel in panels if panel.softmax == softmax):
            cells = {name: run.of(panel, name) for name in names}
            samples = [
                Sample(name, [row["grok_epoch_sustained"] for row in rows])
                for name, rows in cells.items()
                if rows or not swept
            ]
            values = [pair.rpartition("=")[2] for pair in panel.point.split()]
            other = "not swept" if swept else panel.task
            groups.append(("\n".join(values) or other, samples))
        draw_boxes(axes, groups, run.budget, log=max(epochs) > 10 * min(epochs))
        if swept:
            axes.set_xlabel(", ".join(map(plain, grid.values(swept[0]))))
        axes.set_ylabel("grokking epoch")
        if len(kinds) > 1:
            axes.set_title(softmax, loc="left")
    sizes = {len(samples) for panel in panels for n in names if (samples := run.of(panel, n))}
    each = f", n = {min(sizes)} each" if len(sizes) == 1 else ""
    others = [legend_line(f"one training{each}", **POINT_MARK), *_ends(run)]
    legend(figure, names, *others, columns=3 if width < 6 else 6)
    return figure


def _ends(run: Run) -> list[Any]:
    """Of the legend: how many cells are censored, and where."""
    censored = sum(row["censored"] for row in run.rows)
    return [
        legend_line(f"{censored} censored", **BEYOND),
        legend_line(f"budget, {run.budget} epochs", "#444444", lw=1, ls=":"),
    ]


def draw_boxes(
    axes: Axes, groups: Sequence[tuple[str, Sequence[Sample]]], budget: int, log: bool
) -> None:
    """Draw a box per optimizer, in groups, with all points; censored ones open, at the budget.

    Args:
        axes: The panel.
        groups: Per group its label and its samples.
        budget: The epoch at which a training is censored.
        log: Whether the vertical axis is logarithmic.
    """
    axes.axhline(budget, **REFERENCE)
    places, names, centers = [], [], []
    start = 0.0
    # Where there is room each box says whose it is; else the legend's colours do.
    every = [sample for _, samples in groups for sample in samples]
    roomy, equal = len(every) <= 8, len({len(sample.values) for sample in every}) == 1
    for _, samples in groups:
        for place, sample in enumerate(samples, start=1):
            _draw_box(axes, start + place, sample, budget)
            places.append(start + place)
            size = f"n={len(sample.values)}"
            name = f"{optimizer_label(sample.optimizer)}\n{size}" if roomy else size
            names.append("" if equal and not roomy else name)
        centers.append(start + (1 + len(samples)) / 2)
        start += len(samples) + 0.8
    axes.set_xlim(0.3, start - 0.8 + 0.7)
    axes.grid(visible=False, axis="x")
    axes.xaxis.remove_overlapping_locs = False  # a group's middle box keeps its n
    axes.set_xticks(places, names, minor=True)
    axes.set_xticks(centers, [label for label, _ in groups])
    # Two rows of labels: the sizes below the boxes, the group's name below those.
    axes.tick_params(axis="x", which="minor", length=0, labelsize=8 if roomy else 7, pad=4)
    low = 30 if roomy else 5 if equal else 17
    axes.tick_params(axis="x", which="major", length=0, labelsize=9, pad=low)
    if log:
        plain_log_axis(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def draw_quartiles(axes: Axes, place: float, color: str, box: dict[str, float]) -> None:
    """A box with its median; whiskers where they have ends other than its edges."""
    line = {"color": color, "linewidth": 1}
    axes.bxp(
        [{"whislo": box["q1"], "whishi": box["q3"]} | box],
        positions=[place],
        widths=0.6,
        showfliers=False,
        showcaps="whislo" in box,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": color + "22", "edgecolor": color, "linewidth": 1},
        medianprops={"color": color, "linewidth": 2},
        whiskerprops=line,
        capprops=line,
    )


def _draw_box(axes: Axes, place: float, sample: Sample, budget: int) -> None:
    """The quartiles of five and more, of fewer the range; whiskers end where trainings grokked."""
    color = optimizer_color(sample.optimizer)
    known = [value for value in sample.values if value is not None]
    censored = len(sample.values) - len(known)
    counted = known + [budget] * censored
    if len(counted) >= FEW_VALUES:
        q1, middle, q3 = np.percentile(counted, (25, 50, 75))
        ends = {"whislo": min([*known, q1]), "whishi": max([*known, q3])}
        draw_quartiles(axes, place, color, ends | {"q1": q1, "med": middle, "q3": q3})
    elif len(counted) > 1:
        axes.plot([place] * 2, [min(counted), max(counted)], color=color, lw=1, alpha=0.6)
        middle = censored_median(sample.values, [budget] * len(counted))
        if not middle.at_least:
            axes.plot(place, middle.value, color=color, **MEAN_MARK | {"marker": "_"})
    # Points stand apart so that they can be counted; so many triangles could not.
    many = censored > 3
    asides = np.linspace(-0.2, 0.2, len(counted)) if len(counted) > 1 else [0.0] * len(counted)
    for aside, value in zip(asides, sample.values, strict=True):
        if value is not None:
            axes.plot(place + aside, value, color=color, zorder=4, clip_on=False, **POINT_MARK)
        elif not many:
            axes.plot(place + aside, budget, color=color, zorder=4, clip_on=False, **BEYOND)
    if many:
        axes.plot(place, budget, color=color, zorder=4, clip_on=False, **BEYOND)
        style = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"×{censored}", (place, budget), color=color, **style)


def _rows_figure(run: Run) -> Figure:
    """A row per arm: the fastest above, a panel per task and output function; of a sweep by arm."""
    panels: dict[str, list[Arm]] = {}
    for arm in aggregate(run.rows, run.budget):
        panels.setdefault(arm.label if run.is_sweep else str(arm.panel), []).append(arm)
    if not run.is_sweep:
        panels = {t: sorted(own, key=lambda arm: arm.median()[::-1]) for t, own in panels.items()}
    figure = finals_figure(
        {title: [_row(run, arm) for arm in own] for title, own in panels.items()},
        "grokking epoch (log scale)",
        (f"budget, {run.budget} epochs", run.budget),
        middle="median",
        limit=run.budget,
        beyond="censored",
        log=True,
    )
    for axes, own in zip(figure.axes, panels.values(), strict=True):
        axes.set_ylabel(", ".join(map(plain, grid.values(own[0].panel.point))))
    return figure


def _row(run: Run, arm: Arm) -> Final:
    """A setting's values without their names, as "0.01, 1", or the optimizer's name."""
    values = ", ".join(p.rpartition("=")[2] for p in arm.panel.point.split()) or "the run's"
    epochs = [cell["grok_epoch_sustained"] or math.inf for cell in arm.cells]
    median = math.inf if arm.median().at_least else arm.median().value
    lost = [cell["collapse_epoch"] for cell in arm.cells if cell["collapse_epoch"]]
    label = values if run.is_sweep else arm.label
    return Final(label, optimizer_color(arm.optimizer), epochs, median, None, lost)


def survival_figure(run: Run) -> Figure:
    """Share of cells that have not grokked, against epoch: a curve for each optimizer."""
    figure = new_figure(6.6, 3.6)
    axes = figure.subplots()
    handles = []
    for name in run.optimizers():
        cells = [row["grok_epoch_sustained"] for row in run.of(None, name)]
        color, label = optimizer_color(name), f"{optimizer_label(name)}, n = {len(cells)}"
        handles.append(legend_line(label, color, lw=4))
        if cells:
            times, shares = statistics.survival(cells, run.budget)
            axes.step(times, [100 * x for x in shares], where="post", color=color, lw=1.8)
    axes.set(xlim=(0, run.budget), ylim=(0, 102), xlabel="epoch", ylabel="not yet grokked (%)")
    legend(figure, (), *handles, columns=3)
    return figure


def pictures(run: Run) -> list[Picture]:
    """Of a run's cells: curves where there is a log, epochs, and survival of few optimizers."""
    censored, finished = sum(row["censored"] for row in run.rows), len(run.rows)
    curves = CURVES.format(begun=len(run.cells), finished=finished)
    shape = ROWS if in_rows(run) else QUARTILES
    epochs = EPOCHS.format(censored=censored, budget=run.budget, shape=shape)
    found = [
        Picture(
            "curves",
            lambda: curves_figure(run),
            curves,
            "Training and validation accuracy against epoch, a panel for each task and output "
            "function, a colour for each optimizer.",
        ),
        Picture(
            "grok_epochs",
            lambda: epochs_figure(run),
            epochs,
            "The sustained grokking epoch of every training, by optimizer, task and output "
            f"function; {censored} of {finished} are censored.",
        ),
        Picture(
            "survival",
            lambda: survival_figure(run),
            SURVIVAL,
            "Share of trainings that have not grokked against epoch, a curve for each optimizer.",
        ),
    ]
    return found[not run.traces : 2 if many_arms(run) else 3]
