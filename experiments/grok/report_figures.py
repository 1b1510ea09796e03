"""The report's figures of cells: accuracy against epoch, and the epochs to grok."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.grok import grid, statistics
from experiments.grok.config import Panel
from experiments.grok.report_data import BASELINE, Arm, Run, aggregate, plain
from experiments.grok.train import GROKKED_ACCURACY
from experiments.report.figures import (
    BEYOND,
    DASHES,
    GROKKED_MARK,
    MEAN_MARK,
    MEMORISED_MARK,
    POINT_MARK,
    REFERENCE,
    draw_series,
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
LOST_MARK: dict[str, Any] = {"marker": "x", "ms": 5, "mew": 1.4, "ls": "none"}


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
    others = [legend_line("one cell", **POINT_MARK), *_ends(run)]
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
    roomy = sum(len(samples) for _, samples in groups) <= 8
    for _, samples in groups:
        for place, sample in enumerate(samples, start=1):
            if sample.values:
                _draw_box(axes, start + place, sample, budget)
            places.append(start + place)
            size = f"n={len(sample.values)}"
            names.append(f"{optimizer_label(sample.optimizer)}\n{size}" if roomy else size)
        centers.append(start + (1 + len(samples)) / 2)
        start += len(samples) + 0.8
    axes.set_xlim(0.3, start - 0.8 + 0.7)
    axes.grid(visible=False, axis="x")
    axes.xaxis.remove_overlapping_locs = False  # a group's middle box keeps its n
    axes.set_xticks(places, names, minor=True)
    axes.set_xticks(centers, [label for label, _ in groups])
    # Two rows of labels: the sizes below the boxes, the group's name below those.
    axes.tick_params(axis="x", which="minor", length=0, labelsize=8 if roomy else 7, pad=4)
    axes.tick_params(axis="x", which="major", length=0, labelsize=9, pad=30 if roomy else 17)
    if log:
        plain_log_axis(axes, "y")
    else:
        axes.set_ylim(bottom=0)


def _draw_box(axes: Axes, place: float, sample: Sample, budget: int) -> None:
    color = optimizer_color(sample.optimizer)
    values = [budget if value is None else value for value in sample.values]
    line = {"color": color, "linewidth": 1}
    axes.boxplot(
        values,
        positions=[place],
        widths=0.6,
        whis=(0, 100),
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": color + "22", "edgecolor": color, "linewidth": 1},
        medianprops={"color": color, "linewidth": 2},
        whiskerprops=line,
        capprops=line,
    )
    offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [0.0]
    for offset, value, shown in zip(offsets, sample.values, values, strict=True):
        mark = BEYOND if value is None else POINT_MARK
        axes.plot(place + offset, shown, color=color, zorder=4, clip_on=False, **mark)


def _rows_figure(run: Run) -> Figure:
    """A row per arm: the fastest above, a column per panel; of a sweep a column per optimizer."""
    columns: dict[str, list[Arm]] = {}
    for arm in aggregate(run.rows, run.budget):
        columns.setdefault(arm.label if run.is_sweep else str(arm.panel), []).append(arm)
    longest = max(map(len, columns.values()), default=1)
    figure = new_figure(max(6.6, 4.2 * len(columns)), 0.21 * longest + 1.3)
    panels = figure.subplots(1, len(columns) or 1, squeeze=False, sharex=True).flat
    for axes, (title, arms) in zip(panels, columns.items(), strict=False):
        if not run.is_sweep:
            arms.sort(key=lambda arm: arm.median()[::-1])
        for place, arm in enumerate(arms):
            _draw_row(axes, place, arm, run)
        labels = [_settings(arm.panel) if run.is_sweep else arm.label for arm in arms]
        axes.set_yticks(range(len(arms)), labels)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.axvline(run.budget, **REFERENCE)
        plain_log_axis(axes, "x")
        axes.set_title(title, loc="left")
        axes.set_xlabel("grokking epoch (log scale)")
        axes.set_ylabel(", ".join(map(plain, grid.values(arms[0].panel.point))))
    lost = sum(bool(row["collapse_epoch"]) for row in run.rows)
    others = [
        legend_line("one cell", **POINT_MARK),
        legend_line("median", **MEAN_MARK),
        *[legend_line(f"{lost} lost again", **LOST_MARK)] * bool(lost),
    ]
    legend(figure, (), *others, *_ends(run), columns=5)
    return figure


def _settings(panel: Panel) -> str:
    """A point's values without their names, as "0.01, 1"."""
    return ", ".join(p.rpartition("=")[2] for p in panel.point.split()) or "the run's"


def _draw_row(axes: Axes, place: int, arm: Arm, run: Run) -> None:
    color = {"color": optimizer_color(arm.optimizer), "zorder": 4}
    found = [cell["grok_epoch_sustained"] for cell in arm.cells]
    shown = sorted(run.budget if epoch is None else epoch for epoch in found)
    axes.plot([shown[0], shown[-1]], [place, place], lw=1.2, alpha=0.6, **color | {"zorder": 2})
    if not (median := arm.median()).at_least:
        axes.plot(median.value, place, **color | MEAN_MARK | {"zorder": 3})
    # Censored cells lie on one spot; a little apart, they can be counted.
    for aside, epoch in zip(np.linspace(-0.2, 0.2, len(found) or 1), found, strict=False):
        at = (run.budget, place + aside) if epoch is None else (epoch, place)
        axes.plot(*at, clip_on=False, **color | (BEYOND if epoch is None else POINT_MARK))
    for cell in arm.cells:
        if cell["collapse_epoch"]:
            axes.plot(cell["collapse_epoch"], place, **color | LOST_MARK)


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
